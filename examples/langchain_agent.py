"""A LangChain agent over a policy: the framework sends no reasoning back, and the policy keeps it over its tool calls.

    python examples/langchain_agent.py

The script stands for a policy; an engine takes its place as `engine`, a checkpoint's Chat.load as `chat`.
"""

import asyncio
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, convert_to_openai_messages
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.tools import tool
from langchain_core.utils.function_calling import convert_to_openai_tool

from trimtab.environments.base import Message, ToolCall
from trimtab.rollout.formats.openai_messages import from_openai, unseen
from trimtab.rollout.scripted import Scripted, byte_chat
from trimtab.rollout.types import Request, Sampling


class Policy(BaseChatModel):
    """One conversation with the policy, as a chat model: its token ids are carried from call to call."""

    chat: Any
    engine: Any
    conversation: Any = None
    _llm_type = "trimtab"

    def bind_tools(self, tools: Any, **options: Any) -> Any:
        return self.bind(tools=[convert_to_openai_tool(one) for one in tools], **options)

    def _generate(self, messages: list[BaseMessage], stop: Any = None, run_manager: Any = None, **options: Any) -> Any:
        first, *rest = convert_to_openai_messages(messages)
        said = from_openai([{**first, "tools": options["tools"]}, *rest])
        if self.conversation is None:
            self.conversation = self.chat.conversation((), thinking=True)
        self.conversation.add(unseen(said, self.conversation.messages))
        prompt = self.conversation.prompt_ids()
        (sampled,) = asyncio.run(self.engine(Request(name="a", prompt_ids=prompt, sampling=Sampling(max_tokens=999))))
        answer = self.conversation.add_sampled(sampled.token_ids)
        calls = [
            {"name": call.name, "args": dict(call.arguments), "id": f"call_{len(prompt)}_{i}"}
            for i, call in enumerate(answer.tool_calls)
        ]
        message = AIMessage(answer.content, tool_calls=calls, additional_kwargs={"reasoning_content": answer.reasoning})
        return ChatResult(generations=[ChatGeneration(message=message)])


@tool
def multiply(a: int, b: int) -> int:
    """Multiply two integers."""
    return a * b


def say(prompt: str, seed: int) -> Message:
    if "<result>" not in prompt:
        return Message("assistant", reasoning="A plum is 6.", tool_calls=(ToolCall("multiply", {"a": 6, "b": 7}),))
    known = "A plum is 6." in prompt
    return Message("assistant", "42" if known else "lost", reasoning="I still know what a plum is.")


def run(question: str) -> tuple[list[BaseMessage], Policy]:
    """LangChain's loop: ask the model, carry out its calls, until it answers."""
    policy = Policy(chat=(chat := byte_chat()), engine=Scripted(chat, say))
    model, messages = policy.bind_tools([multiply]), [SystemMessage("You sell fruit."), HumanMessage(question)]
    while messages[-1].type != "ai" or messages[-1].tool_calls:
        messages.append(model.invoke(messages))
        messages += [multiply.invoke(call) for call in messages[-1].tool_calls]
    return messages, policy


if __name__ == "__main__":
    messages, policy = run("What do seven plums cost?")
    print("LangChain sends:", *convert_to_openai_messages(messages[:-1]), sep="\n  ")
    seen = policy.chat.decode(policy.conversation.prompt_ids())
    print("The policy sees and says:", seen[seen.index("</functions>") :], sep="\n")
