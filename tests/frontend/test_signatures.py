# SPDX-License-Identifier: Apache-2.0
"""Arguments of wrapped methods."""

import pytest

from vllm_parade.frontend.signatures import argument, with_argument


class TestArguments:
    def method(self, first, lora_request=None, *, other=None):
        raise NotImplementedError

    @pytest.mark.parametrize(
        ("args", "kwargs", "value"), [((1, 2), {}, 2), ((1,), {"lora_request": 3}, 3), ((1,), {}, None), ((), {}, None)]
    )
    def test_is_found_however_it_was_passed(self, args, kwargs, value):
        assert argument(self.method, args, kwargs, "lora_request") == value

    @pytest.mark.parametrize(("args", "kwargs"), [((1, 2), {}), ((1,), {"lora_request": 3}), ((1,), {})])
    def test_is_replaced_however_it_was_passed(self, args, kwargs):
        replaced = with_argument(self.method, args, kwargs, "lora_request", 4)
        assert argument(self.method, *replaced, "lora_request") == 4
        assert replaced[0][0] == 1
