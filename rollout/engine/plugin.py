"""What vLLM loads at its start through the entry point vllm.general_plugins."""

from trimtab.rollout.engine.architectures import OURS


def register() -> None:
    """Add the policy and the weight transfer. vLLM calls this in every process, possibly more than once."""
    from vllm import ModelRegistry

    from trimtab.rollout.engine import weights
    from trimtab.rollout.engine.dsa_model import DsaForCausalLM

    ModelRegistry.register_model(OURS, DsaForCausalLM)
    weights.register()
