"""A model that calls two functions: it asks, they run, it goes on with what they gave, until it has nothing more to ask.

    python examples/tool_calls.py [--model FOLDER_OR_ID] [--ask] [QUESTION ...]

The small demo model was taught no tools: it is told which to call for each question, and does not know why. A model that was
taught them, with a chat template that writes them, decides for itself (`tool_choice="auto"`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import cycle
from typing import Any

from arcee_mlx import DEMO_MODEL, Engine, GenerateOptions, ToolCall, run_tools

QUESTIONS = ["What does a lamp cost?", "Then send me two of them, please."]
PRICES = {"anchor": 120, "lamp": 35, "rope": 8}
orders: list[tuple[str, int]] = []


def look_up(item: str) -> dict[str, Any]:
    """Looks up what an item costs.

    Args:
        item: Which. (choices: ["anchor", "lamp", "rope"])
    """
    return {"item": item, "dollars": PRICES[item]}


def order(item: str, count: int) -> str:
    """Orders items for the customer.

    Args:
        item: Which. (choices: ["anchor", "lamp", "rope"])
        count: How many. (choices: [1, 2, 3])
    """
    orders.append((item, count))
    return f"ordered, {PRICES[item] * count} dollars in all"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO_MODEL), help="folder or Hugging Face id (default: the demo model)")
    parser.add_argument("--ask", action="store_true", help="ask before each call")
    parser.add_argument("questions", nargs="*", default=QUESTIONS, metavar="QUESTION", help="one after the other")
    args = parser.parse_args(argv)

    def approve(call: ToolCall) -> bool:
        print(f"  {call}")
        return not args.ask or input("  run it? [y/N] ").strip().lower() == "y"

    tools = [look_up, order]
    choices = cycle(["look_up", "order"] if args.model == str(DEMO_MODEL) else ["auto"])
    with Engine.load(args.model) as engine:
        session = engine.session("You sell ship's goods.")
        for question, choice in zip(args.questions, choices, strict=False):
            print(f"> {question}")
            options = GenerateOptions(tools=tools, tool_choice=choice, max_tokens=200)
            answer = run_tools(session, tools, max_rounds=5, text=question, options=options, approve=approve)
            print(answer.content)
        for message in session.messages:
            if message.role == "tool":
                print(f"  the model was told of {message.name}: {message.content}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
