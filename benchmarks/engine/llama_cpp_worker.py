"""llama.cpp behind a pipe, for `against_llama_cpp.py`; needs nothing but llama-cpp-python.

    python llama_cpp_worker.py FILE.gguf NUM_THREADS CONTEXT

Says {"version"} once, then answers each line {"prompt_ids", "num_tokens"} with {"token_ids", "first_token_seconds",
"decode_seconds"}: llama.cpp's own simple greedy loop, end-of-sequence tokens included, through its C functions, so that
none of the Python wrapper's time is counted.
"""

import ctypes
import json
import sys
import time

import llama_cpp as c


def main() -> None:
    path, num_threads, context_size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    silent = c.llama_log_callback(lambda level, text, data: None)
    c.llama_log_set(silent, ctypes.c_void_p(0))
    c.llama_backend_init()
    model = c.llama_model_load_from_file(path.encode(), c.llama_model_default_params())
    if not model:
        sys.exit(f"llama.cpp cannot load {path}")
    params = c.llama_context_default_params()
    params.n_ctx = params.n_batch = context_size
    params.n_threads = params.n_threads_batch = num_threads
    context = c.llama_init_from_model(model, params)
    if not context:
        sys.exit(f"llama.cpp cannot make a context of {context_size} positions for {path}")
    sampler = c.llama_sampler_init_greedy()
    print(json.dumps({"version": c.__version__}), flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        print(json.dumps(answer(context, sampler, task["prompt_ids"], task["num_tokens"])), flush=True)


def answer(context, sampler, prompt_ids: list[int], num_tokens: int) -> dict:
    c.llama_memory_clear(c.llama_get_memory(context), True)
    tokens = (c.llama_token * len(prompt_ids))(*prompt_ids)
    began = first = last = time.perf_counter()
    token_ids: list[int] = []
    while len(token_ids) < num_tokens:
        if c.llama_decode(context, c.llama_batch_get_one(tokens, len(tokens))):
            sys.exit("llama.cpp cannot decode: is the context too small for prompt and answer?")
        token_ids.append(c.llama_sampler_sample(sampler, context, -1))
        tokens = (c.llama_token * 1)(token_ids[-1])
        last = time.perf_counter()
        first = first if len(token_ids) > 1 else last
    return {"token_ids": token_ids, "first_token_seconds": first - began, "decode_seconds": last - first}


if __name__ == "__main__":
    main()
