"""Order desk: a customer asks about their order, changes or cancels it, and not every wish may be granted.

The tools carry out whatever they are called for; the rules are in the system message and bind the policy.
"""

import random
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from trimtab.environments.base import Message, ToolCall
from trimtab.environments.split import is_held_out
from trimtab.environments.tools.functions import FunctionTool, as_text, tool
from trimtab.environments.tools.tool import opening
from trimtab.environments.user import Scenario, UserEnv, scripted_user, simulated_user

MAX_QUANTITY = 9
REFUSAL = "not possible"
RULES = (
    "You work at the order desk of a shop. An order may be changed or cancelled only while it is open, and changed to "
    f'at most {MAX_QUANTITY} pieces. Do what the customer wants if the rules allow it; if not, answer "{REFUSAL}".'
)
ITEMS = ("lamps", "clocks", "kettles", "ropes", "tiles", "paints", "locks", "brushes")

Kind = Literal["ask", "change", "cancel"]
_PLANS: Sequence[Sequence[Kind]] = (
    ("ask",), ("change",), ("cancel",), ("ask", "change"), ("ask", "cancel"), ("change", "ask"), ("change", "cancel"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Order:
    """What an order holds."""

    item: str
    quantity: int
    status: Literal["open", "shipped", "cancelled"] = "open"


@dataclass(frozen=True, slots=True)
class Wish:
    """One thing that the customer wants, in their words. quantity: what to change the order to."""

    kind: Kind
    text: str
    quantity: int = 0

    def granted(self, order: Order) -> bool:
        """Whether the rules allow it."""
        allowed = self.kind != "change" or self.quantity <= MAX_QUANTITY
        return self.kind == "ask" or (order.status == "open" and allowed)

    def applied(self, order: Order) -> Order:
        """The order as it has to be afterwards."""
        if self.kind == "ask" or not self.granted(order):
            return order
        return replace(order, status="cancelled") if self.kind == "cancel" else replace(order, quantity=self.quantity)

    def call(self, number: int) -> ToolCall:
        """The call that reads or does what is wanted."""
        match self.kind:
            case "ask":
                return ToolCall("look_up", {"order": number})
            case "change":
                return ToolCall("change", {"order": number, "quantity": self.quantity})
            case "cancel":
                return ToolCall("cancel", {"order": number})

    def answer(self, order: Order) -> str:
        """An answer to it that is_answered accepts."""
        if self.kind == "ask":
            return f"It is {order.quantity}."
        return "Done." if self.granted(order) else f"That is {REFUSAL}."

    def is_answered(self, reply: str, order: Order, number: int) -> bool:
        """Whether the reply tells what it has to: the quantity and no number but the order's, or a refusal."""
        if self.kind == "ask":
            return {int(found) for found in re.findall(r"\d{1,9}", reply)} - {number} == {order.quantity}
        return (REFUSAL in reply.lower()) != self.granted(order)


@dataclass(frozen=True, slots=True)
class Case:
    """One conversation to be had: the store, the number of the customer's order in it, and their wishes in order."""

    orders: Mapping[int, Order]
    number: int
    wishes: tuple[Wish, ...]

    def states(self) -> tuple[Order, ...]:
        """The customer's order as it has to be before each wish, and at the end."""
        states = [self.orders[self.number]]
        for wish in self.wishes:
            states.append(wish.applied(states[-1]))
        return tuple(states)

    def told(self, messages: Sequence[Message]) -> float:
        """Share of the wishes that got the right answer."""
        replies = [said.content for said in messages if said.role == "assistant" and not said.tool_calls]
        answered = zip(self.wishes, replies, self.states(), strict=False)
        return sum(wish.is_answered(reply, order, self.number) for wish, reply, order in answered) / len(self.wishes)


def desk_tools(orders: dict[int, Order]) -> tuple[FunctionTool, ...]:
    """Tools look_up(order), change(order, quantity) and cancel(order) that read and change orders."""

    def found(number: int) -> Order:
        if number not in orders:
            raise ValueError(f"no order {number}")
        return orders[number]

    # coroutine functions: the calls of one message change the store one after the other
    async def look_up(order: int) -> Order:
        """Read an order by its number."""
        return found(order)

    async def change(order: int, quantity: int) -> Order:
        """Set the quantity of an order."""
        orders[order] = replace(found(order), quantity=quantity)
        return orders[order]

    async def cancel(order: int) -> Order:
        """Cancel an order."""
        orders[order] = replace(found(order), status="cancelled")
        return orders[order]

    return tool(look_up), tool(change), tool(cancel)


Generate = Callable[[str], Awaitable[str]]
"""Takes the text of a prompt, returns what the user says."""


def open_desk(case: Case, generate: Generate | None = None) -> UserEnv:
    """The desk for one conversation, with a user who follows a script or, given generate, is played by it.

    Reward parts: "state", 1.0 when the store is as rules and wishes have it; "told", the share of the scripted user's
    wishes with the right answer; "outcome", 1.0 when all is right, else 0.0.
    """
    orders = dict(case.orders)
    right = {**case.orders, case.number: case.states()[-1]}
    texts = [wish.text for wish in case.wishes]
    goal = f"Your order is number {case.number}. One after the other: {' '.join(texts)}"
    user = simulated_user(generate, Scenario(goal)) if generate else scripted_user(texts[1:])

    def reward(messages: Sequence[Message]) -> dict[str, float]:
        parts = {"state": float(orders == right)}
        if generate is None:  # a simulated user need not keep to the order of the wishes
            parts["told"] = case.told(messages)
        return parts | {"outcome": float(min(parts.values()) == 1.0)}

    return UserEnv(texts[0], user, desk_tools(orders), reward, system=RULES)


class OrdersTask:
    """Draws conversations at the desk; generate plays their users (see user.simulated_user), or a script if None."""

    def __init__(self, *, generate: Generate | None = None) -> None:
        self._generate = generate

    def sample(self, rng: random.Random, *, held_out: bool = False) -> Callable[[], UserEnv]:
        case = _draw(rng, held_out=held_out)
        return lambda: open_desk(case, self._generate)

    def demonstrate(self, rng: random.Random) -> tuple[Message, ...]:
        """A conversation in which the order is looked up for every wish, and all is right."""
        case = _draw(rng, held_out=False)
        messages = list(opening(case.wishes[0].text, desk_tools({}), RULES))
        for wish, order, after in zip(case.wishes, case.states(), case.states()[1:], strict=False):
            if wish is not case.wishes[0]:
                messages.append(Message("user", wish.text))
            messages += _say("I look the order up.", ToolCall("look_up", {"order": case.number}), order)
            if wish.kind != "ask" and wish.granted(order):
                messages += _say("The rules allow it.", wish.call(case.number), after)
            messages.append(Message("assistant", wish.answer(order), "I answer."))
        return tuple(messages)


def _draw(rng: random.Random, *, held_out: bool) -> Case:
    while True:
        numbers = rng.sample(range(10, 100), 4)
        orders = {
            number: Order(item, rng.randint(1, MAX_QUANTITY), rng.choice(("open", "open", "open", "shipped")))
            for number, item in zip(numbers, rng.sample(ITEMS, 4), strict=True)
        }
        case = Case(orders, numbers[0], _wishes(rng, orders[numbers[0]], numbers[0]))
        if is_held_out(case.wishes[0].text) == held_out:
            return case


def _wishes(rng: random.Random, order: Order, number: int) -> tuple[Wish, ...]:
    wanted = rng.choice([quantity for quantity in range(1, MAX_QUANTITY + 4) if quantity != order.quantity])
    first = {
        "ask": f"How many {order.item} are in order {number}?",
        "change": f"Please make it {wanted} {order.item} in order {number}.",
        "cancel": f"Please cancel order {number}, the {order.item}.",
    }
    later = {"ask": "How many are in it now?", "change": f"Then make it {wanted}.", "cancel": "Then cancel it."}
    return tuple(
        Wish(kind, (later if at else first)[kind], wanted if kind == "change" else 0)
        for at, kind in enumerate(rng.choice(_PLANS))
    )


def _say(reasoning: str, call: ToolCall, result: Order) -> tuple[Message, Message]:
    return Message("assistant", "", reasoning, (call,)), Message("tool", as_text(result))
