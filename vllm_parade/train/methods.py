# SPDX-License-Identifier: Apache-2.0
"""PEFT configs of PARADE and of the methods it is compared with."""

from typing import Any

from peft import IA3Config, LoraConfig, PeftConfig

from vllm_parade.adapter import AdapterError, BaseModelShape
from vllm_parade.adapter.validation import check_config
from vllm_parade.tuner import ParadeConfig
from vllm_parade.tuner.layout import layout_of

LINEAR_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# The paper's baselines for the LLaMA family. LoRA has rank 4 on all linear modules. (IA)3 scales the same outputs as
# PARADE, with the same vector for every prompt. `feedforward_modules` is empty because PEFT scales those at the input.
METHODS: dict[str, tuple[type[PeftConfig], dict[str, Any]]] = {
    "parade": (ParadeConfig, {}),
    "lora": (LoraConfig, {"r": 4, "lora_alpha": 8, "target_modules": LINEAR_MODULES}),
    "ia3": (IA3Config, {"target_modules": ["q_proj", "v_proj", "up_proj"], "feedforward_modules": []}),
}


def peft_config(method: str, settings: dict[str, Any]) -> PeftConfig:
    """The PEFT config of a method; `settings` override its defaults.

    Raises:
        ValueError: the method does not have a setting, or refuses its value.
    """
    kind, defaults = METHODS[method]
    try:
        return kind(**{"task_type": "CAUSAL_LM", **defaults, **settings})
    except AdapterError as error:
        raise AdapterError(f"--peft got {settings} for {method}: {error}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"--peft got {settings} for {method}: {error}") from error


def check_fit(config: PeftConfig, model_config: Any) -> None:
    """Check that a PARADE adapter fits the base model. PEFT checks other methods after loading the model.

    Raises:
        AdapterError: names --model or --peft, the value and what was expected.
    """
    if not isinstance(config, ParadeConfig):
        return
    try:
        layout_of(model_config)
    except AdapterError as error:
        raise AdapterError(f"--model: {error}") from error
    try:
        check_config(config.adapter_config(), BaseModelShape.from_hf_config(model_config), None, None)
    except AdapterError as error:
        raise AdapterError(f"--peft: {error}") from error
