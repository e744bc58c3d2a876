"""What a model folder holds beside its weights: code generated from this package, and files for Hugging Face.

- ``write_config``: ``config.json``, for this project and for transformers;
- ``write_code``: ``modeling_armd.py``, the model in one file that needs torch and safetensors only, and the
  Hugging Face classes on top of it;
- ``write_tokenizer_settings``: how ``AutoTokenizer`` reads the folder's tokenizer;
- ``card``: the model card.
"""

import ast
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from armd_scale.inference.network import ARMDConfig

_PARTS = ("network", "sampling", "decoding", "model")

_AUTO_MAP = {
    "AutoConfig": "huggingface_armd.ARMDHubConfig",
    "AutoModelForCausalLM": "huggingface_armd.ARMDForCausalLM",
}

FILES = re.compile(
    r"config\.json|generation_config\.json|tokenizer\.(json|model)|tokenizer_config\.json|README\.md|"
    r"(modeling|huggingface|tokenization)_armd\.py|__pycache__|model.*\.safetensors(\.index\.json)?"
)
"""Names of the files of a model folder."""


def write_config(folder: Path, config: ARMDConfig, facts: dict[str, Any]) -> None:
    """Write ``config.json``: the model's shape, what transformers asks for, and ``facts`` to keep beside them."""
    fields = {
        **vars(config),
        "architectures": ["ARMDForCausalLM"],
        "auto_map": _AUTO_MAP,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
        "dtype": "float32",
        **facts,
    }
    (folder / "config.json").write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")


def write_code(folder: Path) -> None:
    """Write the code of a model folder."""
    (folder / "modeling_armd.py").write_text(_joined(), encoding="utf-8")
    source = _source("huggingface")
    places = "|".join(_PARTS)
    single = re.sub(rf"from armd_scale\.inference\.({places}) import", "from .modeling_armd import", source)
    (folder / "huggingface_armd.py").write_text(single, encoding="utf-8")
    (folder / "tokenization_armd.py").write_text(_source("tokenization"), encoding="utf-8")


def _source(part: str) -> str:
    return Path(__file__).with_name(f"{part}.py").read_text(encoding="utf-8")


def _joined() -> str:
    """The modules of the standalone model as one file: their imports once, then their code in turn."""
    plain, bodies, head = set(), [], ""
    named: defaultdict[str, set[str]] = defaultdict(set)
    for part in _PARTS:
        source = _source(part)
        lines, tree = source.splitlines(), ast.parse(source)
        head = ast.get_docstring(tree) or ""  # the last part's: it is what the others are there for
        skipped = {0}
        for node in tree.body:
            is_import = isinstance(node, ast.Import | ast.ImportFrom)
            if node is tree.body[0] or is_import:
                skipped |= set(range(node.lineno - 1, node.end_lineno or node.lineno))
            if isinstance(node, ast.Import):
                plain.add(ast.unparse(node))
            elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("armd_scale."):
                named[node.module] |= {name.name for name in node.names}
        bodies.append("\n".join(line for number, line in enumerate(lines) if number not in skipped).strip())
    lines = [*plain, *(f"from {module} import {', '.join(sorted(names))}" for module, names in named.items())]
    ordered = sorted(lines, key=lambda line: ("torch" in line, line.startswith("from"), line))
    made = "Generated from armd_scale/inference: change it there."
    return "\n\n".join([f'"""{head}\n\n{made}\n"""', "\n".join(ordered), *bodies]) + "\n"


def write_tokenizer_settings(folder: Path, length: int, bos: str, eos: str) -> None:
    """Write ``tokenizer_config.json`` for the tokenizer file in ``folder``: BOS before each text."""
    settings: dict[str, Any] = {
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": eos,
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # the text of a special token in a document is text
    }
    pieces = (folder / "tokenizer.model").is_file()
    name = "ARMDTokenizer" if pieces else "ARMDTokenizerFast"
    place = f"tokenization_armd.{name}"
    settings |= {"tokenizer_class": name, "auto_map": {"AutoTokenizer": [place, None] if pieces else [None, place]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


_EXACT = "model.nll(text)  # nats per token, left to right"

_CARDS = {
    "armd": (
        "An auto-regressive masked diffusion language model (ARMD, arXiv 2601.16971), trained and exported with "
        "armd_scale. It\nscores a text exactly in any generation order, and writes up to S tokens a step in S parallel "
        "streams.",
        "armd, masked-diffusion, parallel-decoding",
        "streams=4",
        _EXACT,
    ),
    "ar": (
        "A left-to-right language model, trained and exported with armd_scale as a baseline of its ARMD models.",
        "left-to-right",
        "",
        _EXACT,
    ),
    "mdm": (
        "A masked diffusion language model (absorbing, as MDLM and RADD), trained and exported with armd_scale as a "
        "baseline of\nits ARMD models. It has a bound of a text's likelihood, and writes in any number of steps.",
        "masked-diffusion, parallel-decoding",
        "steps=16",
        "model.bound(text, draws=32)  # nats per text, from above",
    ),
}
"""Of each objective: what the card says, tags, a way of decoding, how a text is scored."""


def card(name: str, config: ARMDConfig, facts: dict[str, Any]) -> str:
    """The model card of a folder.

    ``facts``: ``parameters``, ``checkpoint``, ``difference`` to the training model's logits, ``tokens`` trained on,
    ``text``, and ``heldout``: figures of the newest evaluation by kind of order, in bits per byte.
    """
    scores = facts["heldout"].items()
    heldout = "".join(f"| held-out text, {kind}, bits per byte | {value:.4f} |\n" for kind, value in scores)
    words, tags, decoding, scored = _CARDS[config.objective]
    setting = decoding + ", " if decoding else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [{tags}]
---

# {name}

{words}

| | |
|---|---|
| parameters | {facts["parameters"]:,} |
| layers x width x heads | {config.layers} x {config.hidden} x {config.heads} |
| vocabulary, longest text | {config.vocab_size:,}, {config.length:,} tokens |
| checkpoint | {facts["checkpoint"]} |
| training tokens | {facts["tokens"]:,} |
| training text | {facts["text"]} |
{heldout}| largest difference to the training model's logits | {facts["difference"]:.1e} |

With this folder alone, torch and safetensors:

```python
import modeling_armd as armd  # the file in this folder

model = armd.load(".")
text = model.generate([[5, 6, 7]], decoding=armd.Decoding({decoding}), seed=1)
{scored}
```

With transformers:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)
inputs = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32, do_sample=True, {setting}seed=1)[0]))
```

It knows what was in its training text, and nothing else: it has not been tuned to follow instructions or to avoid
harmful text.
"""
