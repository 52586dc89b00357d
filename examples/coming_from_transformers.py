"""The two examples of transformers' Arcee page, and the same here: their lines are the comments, ours stand below them.

    python examples/coming_from_transformers.py [--model arcee-ai/AFM-4.5B]

The default model is the small one that comes with the package, which knows nothing of Arcee. No device is chosen and no
gradient switched off: MLX has one memory for CPU and GPU, and computes gradients only where a function asks for them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from arcee_mlx import DEMO_MODEL, GenerateOptions, generate, load, stream_generate

PROMPT = "The key innovation in Arcee is"


def run_pipeline(model_id: str) -> None:
    """Text in, text out."""
    # pipeline = pipeline(
    #     task="text-generation",
    #     model="arcee-ai/AFM-4.5B",
    #     dtype=torch.float16,
    #     device=0
    # )
    model, tokenizer = load(model_id)  # in the checkpoint's dtype; dtype="float16" here, too, for another

    # output = pipeline("The key innovation in Arcee is")
    # Up to 256 tokens, as there. A pipeline samples at 0.7 where the checkpoint names no temperature: so do we if told.
    options = None if "temperature" in tokenizer.generation_config else GenerateOptions(temp=0.7)
    output = generate(model, tokenizer, PROMPT, options)

    # print(output[0]["generated_text"])
    print(PROMPT + output)  # what is generated comes without the prompt


def run_generate(model_id: str) -> None:
    """Token ids in, token ids out."""
    # tokenizer = AutoTokenizer.from_pretrained("arcee-ai/AFM-4.5B")
    # model = ArceeForCausalLM.from_pretrained("arcee-ai/AFM-4.5B", device_map="auto")
    model, tokenizer = load(model_id)

    # inputs = tokenizer("The key innovation in Arcee is", return_tensors="pt")
    inputs = tokenizer.encode(PROMPT)

    # with torch.no_grad():
    #     outputs = model.generate(**inputs, max_new_tokens=50)
    options = GenerateOptions(max_tokens=50)
    outputs = [chunk.token for chunk in stream_generate(model, tokenizer, inputs, options)]

    # print(tokenizer.decode(outputs[0], skip_special_tokens=True))
    print(tokenizer.decode([*inputs, *outputs], skip_special_tokens=True))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO_MODEL), help="folder or Hugging Face id (default: the demo model)")
    args = parser.parse_args(argv)
    run_pipeline(args.model)
    print("-" * 20)
    run_generate(args.model)
    return 0


if __name__ == "__main__":
    sys.exit(main())
