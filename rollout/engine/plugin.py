"""What vLLM loads at its start through the entry point vllm.general_plugins."""

from trimtab.rollout.engine.architectures import OURS


def register() -> None:
    """Add the policy and the weight transfer. vLLM calls this in every process, possibly more than once."""
    from vllm import ModelRegistry

    from trimtab.rollout.engine import receive
    from trimtab.rollout.engine.dsa import recording
    from trimtab.rollout.engine.dsa.model import DsaForCausalLM

    ModelRegistry.register_model(OURS, DsaForCausalLM)
    recording.register()
    receive.register()


def resolve(architecture: str) -> None:
    """Import a model of vLLM's now: to learn about one by its name alone, vLLM starts a process that imports all of
    itself again, for about ten seconds."""
    from vllm import ModelRegistry

    model = ModelRegistry.models.get(architecture)
    if model is not None:
        ModelRegistry.register_model(architecture, model.load_model_cls())
