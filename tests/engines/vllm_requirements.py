"""Prints what a wheel of vLLM requires, without torch and its companions: `vllm_requirements.py WHEEL`.

The CPU wheel names builds of torch that PyPI does not have.
"""

import re
import sys
import zipfile

LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec", "setuptools"}


def main():
    with zipfile.ZipFile(sys.argv[1]) as wheel:
        [metadata] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        lines = wheel.read(metadata).decode().splitlines()
    for line in lines:
        name, _, requirement = line.partition(": ")
        if name != "Requires-Dist" or "extra ==" in requirement:
            continue
        if re.match(r"[\w.-]+", requirement)[0].lower() not in LEFT_OUT:
            print(requirement)


if __name__ == "__main__":
    main()
