"""Loading a model and its tokenizer: hub ids, local folders, and GGUF files (converted once, then cached)."""

import hashlib
import json
import os
import re
import shutil
import struct
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from treedecode.common import env
from treedecode.common.machine import version


def load_pretrained(
    path_or_id: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    gguf_file: str | None = None,
    **kwargs: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal language model in evaluation mode, and its tokenizer.

    Args:
        path_or_id: a hub id, a folder written by `save_pretrained`, a folder that holds a GGUF file, or a `.gguf` file.
        dtype: of the weights; None takes the checkpoint's own, and bfloat16 for GGUF (whose blocks have none).
        gguf_file: name of the GGUF file in `path_or_id`. Its weights are unpacked once and kept as safetensors under
            `env.cache_dir()`, keyed by the file's content and dtype; later loads take the converted copy.
        kwargs: passed on to `AutoModelForCausalLM.from_pretrained` (`revision`, `attn_implementation`, ...).

    Raises:
        FileNotFoundError: a local path or GGUF file that does not exist.
        OSError: Transformers finds no model under the id.
        ValueError: Transformers cannot load what it finds, a file is damaged, or a GGUF file lacks weights or is one of
            several parts.
    """
    source = os.fspath(path_or_id)
    if gguf_file is None and source.endswith(".gguf"):
        source, gguf_file = os.path.split(os.path.abspath(source))
    if gguf_file is not None:
        source = str(convert_gguf(_gguf_path(source, gguf_file, kwargs.get("revision")), dtype or torch.bfloat16))
    elif _looks_local(source) and not os.path.isdir(source):
        raise FileNotFoundError(f"path_or_id: no model folder at {source}")
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype="auto" if dtype is None else dtype, **kwargs)
        tokenizer = AutoTokenizer.from_pretrained(source, revision=kwargs.get("revision", "main"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"path_or_id: a file of {source} is damaged: {error}") from error
    return model.to(device).eval(), tokenizer


def _looks_local(source: str) -> bool:
    return source.startswith((".", "~")) or os.path.isabs(source)


def _gguf_path(source: str, gguf_file: str, revision: str | None) -> Path:
    if os.path.isdir(source) or _looks_local(source):
        path = Path(source) / gguf_file
        if not path.is_file():
            raise FileNotFoundError(f"gguf_file: no file {path}")
        return path
    return Path(str(cached_file(source, gguf_file, revision=revision or "main")))


def convert_gguf(path: Path, dtype: torch.dtype) -> Path:
    """Converts a GGUF file to a folder of safetensors of `dtype`, if no earlier call has, and returns the folder.

    The folder appears under its name in one step, complete; two processes that convert at once both succeed. Its name
    is of the file's content, the dtype and the versions of the packages that convert.

    Raises:
        ValueError: the file is damaged, lacks weights of its model, or is one of several parts.
    """
    if (part := re.search(r"-(\d{5})-of-(\d{5})\.gguf$", path.name)) and part[2] != "00001":
        raise ValueError(
            f"gguf_file: {path.name} is one of {int(part[2])} parts, which Transformers does not put together; merge "
            "them first: llama-gguf-split --merge FIRST_PART MERGED.gguf"
        )
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    for package in ("transformers", "gguf", "torch"):  # another version may convert in another way
        digest.update(f" {package} {version(package)}".encode())
    target = env.cache_dir() / "gguf" / f"{path.stem}-{str(dtype).removeprefix('torch.')}-{digest.hexdigest()[:16]}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=".converting-"))
    try:
        model, tokenizer = _load_gguf(path, dtype)
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        try:
            scratch.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was faster, and its copy is as good
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _load_gguf(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    options: dict[str, Any] = {"gguf_file": path.name, "dtype": dtype, "output_loading_info": True}
    # Releases that can keep GGUF blocks packed do so unless told not to, and a packed model cannot be saved; earlier
    # ones always unpack and know no such option.
    if (gguf_config := getattr(transformers, "GgufConfig", None)) is not None:
        options["quantization_config"] = gguf_config(gguf_file=path.name, dequantize=True)
    _check_gguf(path)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    loaded: Any = AutoModelForCausalLM.from_pretrained(path.parent, **options)
    model, info = loaded
    if missing := sorted({*info["missing_keys"], *map(str, info["mismatched_keys"])}):
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ValueError(f"gguf_file: {path.name} lacks weights of {type(model).__name__}: {shown}")
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer


def _check_gguf(path: Path) -> None:
    """Reads the headers of a GGUF file, and that its tensors are in it."""
    import gguf  # which only these files need

    try:
        gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, struct.error) as error:  # of a file that ends early, or of another kind
        raise ValueError(f"gguf_file: {path.name} is damaged, or no GGUF file: {error}") from error
