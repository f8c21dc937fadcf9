# SPDX-License-Identifier: Apache-2.0
"""PARADE as a method of PEFT: `get_peft_model(model, ParadeConfig())`, `PeftModel.from_pretrained(model, folder)`.

Importing this package registers the method with PEFT. It does not import vLLM.
"""

from aenum import extend_enum
from peft import PeftType
from peft.utils import register_peft_method

if "PARADE" not in PeftType.__members__:
    # PEFT registers external methods only under names of this enum.
    extend_enum(PeftType, "PARADE", "PARADE")

from vllm_parade.tuner import attention
from vllm_parade.tuner.config import ParadeConfig
from vllm_parade.tuner.model import GENERATOR, ParadeModel

attention.register()
register_peft_method(name="parade", config_cls=ParadeConfig, model_cls=ParadeModel, prefix=GENERATOR)

__all__ = ["ParadeConfig", "ParadeModel"]
