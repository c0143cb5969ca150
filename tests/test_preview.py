import pytest

from trimtab.environments.base import Message, ToolCall
from trimtab.grpo.commands.preview import preview
from trimtab.grpo.config import Config, Domain

AGENT = Config(domains={"agent": Domain(task="trimtab.environments.tasks.agent:AgentTask")})


def say(prompt: str, seed: int) -> Message:
    """Looks up a key, then answers what it read; the second episode of a group answers at once."""
    if seed % 2:
        return Message("assistant", "0", "I guess.")
    if "<result>" not in prompt:
        return Message("assistant", "", "I look.", (ToolCall("get", {"key": "corn"}),))
    return Message("assistant", prompt.rpartition("<result>")[2].partition("</result>")[0], "I read.")


def test_a_recipe_is_played_and_told(capsys):
    (group,) = preview(AGENT, say)
    told = capsys.readouterr().out
    assert {episode.ended for episode in group.episodes} == {"done"}
    assert 'assistant calls get({"key": "corn"})' in told and "assistant thinks: I guess." in told
    assert told.count("reward ") == 2 and "outcome" in told


def test_a_recipe_whose_task_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="nowhere:Task"):
        preview(Config(domains={"x": Domain(task="nowhere:Task")}), say)
