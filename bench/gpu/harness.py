"""Checks and times contestants beside each other, and writes a file of results row by row."""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gpu.contestants import Builders, Contestant, NotApplicable
from bench.gpu.timing import ROUNDS, Timing, call_seconds, clock_seconds, event_seconds, measure_peaks, synchronize
from bench.harness import dtype_name


def environment(device: torch.device, commit: str | None) -> dict[str, Any]:
    """Describes software and device for readers of a result. Clocks are read, never set."""
    result: dict[str, Any] = {"commit": commit or _commit(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for package in ("triton", "transformers", "flashinfer-python", "flash-attn"):
        try:
            result[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            result[package] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        result |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            **_nvidia_smi(device.index or 0),
        }
    else:
        result |= {"device": "cpu"}
    return result


def _commit() -> str:
    def git(*args: str) -> str:
        return subprocess.run(["git", *args], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown (not a git checkout)"


def _nvidia_smi(index: int) -> dict[str, str]:
    fields = {
        "driver": "driver_version",
        "sm_clock_mhz": "clocks.sm",
        "sm_clock_max_mhz": "clocks.max.sm",
        "memory_clock_mhz": "clocks.mem",
        "power_limit_w": "power.limit",
        "temperature_c": "temperature.gpu",
    }
    query = ["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader,nounits"]
    try:
        line = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return {"driver": f"nvidia-smi failed: {error}"}
    return dict(zip(fields, (value.strip() for value in line.split(",")), strict=False))


def tensors_of(result: object) -> list[Tensor]:
    """Returns the tensors of a call's result, in order."""
    if isinstance(result, Tensor):
        return [result]
    return [x for x in result if isinstance(x, Tensor)] if isinstance(result, Iterable) else []


def relative_error(got: Tensor, want: Tensor) -> float:
    """Returns the norm of the difference over the norm of the truth; NaN if either has one."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def worst(errors: Iterable[float]) -> float:
    """Returns the largest error; NaN if one of them is."""
    return float(torch.tensor(list(errors), dtype=torch.float64).max())


class Session:
    """Runs one part of the benchmarks, and keeps a file of its results that is complete after every row."""

    def __init__(self, part: str, args: argparse.Namespace) -> None:
        self.part, self.smoke = part, args.smoke
        self.device = torch.device("cpu" if args.smoke else "cuda:0")
        self._only, self._deadline = args.only, time.monotonic() + args.seconds
        self._skip = [text for text in args.skip.split(",") if text]
        self._patience = args.patience
        self._path = Path(args.out) / f"{part}.json"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._broken = False
        self.peaks = measure_peaks(self.device, self.smoke)
        self._results: dict[str, Any] = {
            "part": part,
            "smoke": self.smoke,
            "environment": environment(self.device, args.commit),
            "peaks": asdict(self.peaks),
            "rows": [],
            "hung": [],
            "not_reached": [],
            "finished": False,
        }
        if args.resume:
            self._results |= self._earlier()
        self._done = {row["case"] for row in self._results["rows"]}
        self._write()

    def _earlier(self) -> dict[str, Any]:
        """Reads the results of an earlier run of the same commit on the same kind of device."""
        if not self._path.exists():
            return {}
        earlier = json.loads(self._path.read_text())
        same = all(earlier["environment"][name] == self._results["environment"][name] for name in ("commit", "device"))
        return {name: earlier[name] for name in ("rows", "hung")} if same else {}

    def cases(self, cases: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """Yields the cases asked for; once time is up, the others are listed as not reached."""
        for name, case in cases.items():
            if name in self._done or (self._only is not None and self._only not in name):
                continue
            if time.monotonic() > self._deadline:
                self._results["not_reached"].append(name)
                continue
            yield name, case
        self._results["finished"] = True
        self._write()

    def note(self, name: str, value: object) -> None:
        """Stores a value beside the rows."""
        self._results[name] = value
        self._write()

    def add(self, row: dict[str, Any]) -> None:
        """Adds a row, in the place of an earlier one of the same case."""
        self._results["rows"] = [other for other in self._results["rows"] if other["case"] != row["case"]] + [row]
        self._write()
        for entry in row["entries"]:
            timing = entry.get("cold") or entry.get("warm")
            text = f"{timing['seconds'] * 1e6:.1f} us" if timing else entry.get("skipped", "")
            print(f"{self.part} | {row['case']} | {entry['name']} | {text}", flush=True)

    @property
    def failed(self) -> bool:
        """True if one of our own backends could not do its work."""
        entries = (entry for row in self._results["rows"] for entry in row["entries"])
        return any(entry["ours"] and entry.get("failed") for entry in entries)

    def _write(self) -> None:
        scratch = self._path.with_suffix(".tmp")
        scratch.write_text(json.dumps(self._results, indent=1) + "\n")
        os.replace(scratch, self._path)

    def measure(
        self, case: str, ours: Builders, peers: Builders, *, num_bytes: float, num_flops: float, dtype: torch.dtype,
        num_layers: int = 1, **notes: object,
    ) -> None:  # fmt: skip
        """Checks and times every contestant of a case, and adds the row.

        Args:
            num_bytes, num_flops: bytes and operations that any implementation must move and do.
            num_layers: layers that share a plan.
            notes: further values to keep in the row.
        """
        entries = []
        for name, build in {**ours, **peers}.items():
            if any(text in name for text in self._skip):
                entries.append({"name": name, "ours": name in ours, "skipped": "left out on request"})
            elif self.has_hung(case, name):
                entries.append({"name": name, "ours": name in ours, "skipped": "hung", "failed": True})
            elif not self._broken:
                with self.watched(case, name):
                    entries.append(self._entry(name, build, name in ours, num_layers))
        for entry in entries:
            for temperature in ("warm", "cold"):
                if temperature in entry:
                    seconds = entry[temperature]["seconds"]
                    entry[temperature]["copy_percent"] = num_bytes / seconds / self.peaks.copy_gbs / 1e7
                    entry[temperature]["tflops"] = num_flops / seconds / 1e12
        floor = self.peaks.roofline_seconds(num_bytes, num_flops, dtype)
        self.add(
            {
                "case": case,
                "bytes": num_bytes,
                "flops": num_flops,
                "dtype": dtype_name(dtype),
                "floor_seconds": floor,
                "entries": entries,
                **notes,
            }
        )
        if self._broken:
            raise SystemExit(f"the device reports errors since {entries[-1]['name']!r} of {case!r}")

    def has_hung(self, case: str, name: str) -> bool:
        """Returns whether a contestant did not end in an earlier process of this run."""
        return [case, name] in self._results["hung"]

    def seconds_of(self, case: str) -> float | None:
        """Returns the warm time of the first contestant of a row, where it has one."""
        rows = [row for row in self._results["rows"] if row["case"] == case]
        return rows[0]["entries"][0].get("warm", {}).get("seconds") if rows else None

    @contextmanager
    def watched(self, case: str, name: str) -> Iterator[None]:
        """Ends the process if a contestant does not end: nothing else ends a kernel that hangs."""
        timer = threading.Timer(self._patience, self._give_up, (case, name))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _give_up(self, case: str, name: str) -> None:
        self._results["hung"].append([case, name])
        self._write()
        print(f"{self.part} | {case} | {name} | did not end within {self._patience:g} s", file=sys.stderr, flush=True)
        os._exit(3)

    def _entry(self, name: str, build: Callable[[], Contestant], ours: bool, num_layers: int) -> dict[str, Any]:
        entry: dict[str, Any] = {"name": name, "ours": ours}
        try:
            self._fill(entry, build(), num_layers)
        except NotApplicable as reason:
            entry["skipped"] = str(reason)
        except Exception as error:  # anything that a peer or a kernel under test raises goes into the results
            entry["skipped"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            entry["failed"] = True
            self._broken = self._device_is_lost()
        if self.device.type == "cuda" and not self._broken:
            torch.cuda.empty_cache()
        return entry

    def _device_is_lost(self) -> bool:
        """Returns whether the device reports an error, which every later call would report again."""
        try:
            synchronize(self.device)
        except RuntimeError:
            return True
        return False

    def _fill(self, entry: dict[str, Any], contestant: Contestant, num_layers: int) -> None:
        call, ours = contestant.call, entry["ours"]
        if contestant.notes:
            entry["notes"] = contestant.notes
        first = [x.clone() for x in tensors_of(call(0))]
        if contestant.error is not None:
            entry["error"] = contestant.error()
            if not entry["error"] <= contestant.limit:
                raise ArithmeticError(f"wrong result: error {entry['error']:.2e} above {contestant.limit:.2e}")
        if ours:
            repetitions = [tensors_of(call(0)) for _ in range(2)]
            entry["repeatable"] = all(all(map(torch.equal, first, other)) for other in repetitions)
            if not entry["repeatable"]:
                raise ArithmeticError("the result differs from run to run")
        if contestant.timing is not None:
            entry["warm"] = asdict(contestant.timing())
            return
        entry["warm"] = asdict(self._time(call, [0], ours, entry))
        if contestant.num_sets > 1:
            entry["cold"] = asdict(self._time(call, range(contestant.num_sets), ours, entry))
        elif contestant.self_evicting:
            entry["cold"] = dict(entry["warm"])
        if contestant.plan is not None:
            timing = (
                call_seconds(lambda _: contestant.plan(), [0], self.device)  # type: ignore[misc]
                if contestant.plan_method == "graph"
                else clock_seconds(contestant.plan, self.device, rounds=2 if self.smoke else ROUNDS)
            )
            entry["plan"] = asdict(timing) | {"seconds_per_layer": timing.seconds / num_layers}

    def _time(self, call: Callable[[int], Any], sets: Sequence[int], ours: bool, entry: dict[str, Any]) -> Timing:
        try:
            return call_seconds(call, sets, self.device)
        except Exception as error:
            if ours or self.device.type != "cuda":
                raise  # an op of ours that cannot be captured is broken
            torch.cuda.synchronize(self.device)
            entry["not_captured"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            return event_seconds(call, sets)


def parser(description: str) -> argparse.ArgumentParser:
    """Makes a parser of the arguments that all parts take."""
    arguments = argparse.ArgumentParser(description=description)
    arguments.add_argument("--out", default="bench/results/local/gpu", help="folder of the results")
    arguments.add_argument("--seconds", type=float, default=480.0, help="start no further case after this long")
    arguments.add_argument("--only", help="only cases whose name contains this")
    arguments.add_argument(
        "--resume", action="store_true", help="keep the cases that an earlier run has left in that folder"
    )
    arguments.add_argument("--skip", default="", help="not the contestants whose name contains one of these (a,b,...)")
    arguments.add_argument("--patience", type=float, default=150.0, help="seconds that a contestant has")
    arguments.add_argument("--commit", help="what to write down as the commit, where git cannot say")
    arguments.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU, to run the code")
    return arguments
