"""A Llama in llama.cpp, in a process of its own: `benchmarks.peers` runs this file.

It imports nothing of this project, so any Python with xllamacpp, gguf and numpy can run it. The first line of its input
is `d_model layers d_ff heads kv_heads head_dim vocab format threads rows`; it writes such a model with random weights,
loads it and answers with what llama.cpp says of the processor. Then `generate P N` reads a prompt of P tokens and makes
N more, and `decode N` makes N tokens of each of `rows` sequences after contexts of 128, which are in the cache; these
are requests that come at once, as from several users. Either is answered with its processor time in seconds.
"""

import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import gguf  # pyright: ignore[reportMissingImports]
import numpy as np
import xllamacpp  # pyright: ignore[reportMissingImports]

FORMATS = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0"}
CONTEXT = 128


def write(
    path: str, kind: str, d_model: int, layers: int, d_ff: int, heads: int, kv_heads: int, width: int, vocab: int
):
    """Write the model."""
    file = gguf.GGUFWriter(path, "llama")
    file.add_context_length(65_536)
    file.add_embedding_length(d_model)
    file.add_block_count(layers)
    file.add_feed_forward_length(d_ff)
    file.add_head_count(heads)
    file.add_head_count_kv(kv_heads)
    file.add_key_length(width)
    file.add_value_length(width)
    file.add_rope_dimension_count(width)
    file.add_layer_norm_rms_eps(1e-6)
    file.add_vocab_size(vocab)
    # Some vocabulary it must have: special tokens, bytes, and names.
    named = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    file.add_tokenizer_model("llama")
    file.add_token_list(named + [f"t{i}" for i in range(vocab - len(named))])
    file.add_token_scores([0.0] * vocab)
    file.add_token_types([2, 3, 3, *[6] * 256, *[1] * (vocab - len(named))])
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    kept = gguf.GGMLQuantizationType[FORMATS[kind]]
    draw = np.random.default_rng(0)

    def add(name: str, *size: int) -> None:
        x = np.float32(0.02) * draw.standard_normal(size, np.float32)
        file.add_tensor(name, gguf.quants.quantize(x, kept), raw_dtype=kept)

    add("token_embd.weight", vocab, d_model)
    add("output.weight", vocab, d_model)
    file.add_tensor("output_norm.weight", np.ones(d_model, np.float32))
    for i in range(layers):
        for norm in ("attn_norm", "ffn_norm"):
            file.add_tensor(f"blk.{i}.{norm}.weight", np.ones(d_model, np.float32))
        add(f"blk.{i}.attn_q.weight", heads * width, d_model)
        add(f"blk.{i}.attn_k.weight", kv_heads * width, d_model)
        add(f"blk.{i}.attn_v.weight", kv_heads * width, d_model)
        add(f"blk.{i}.attn_output.weight", d_model, heads * width)
        add(f"blk.{i}.ffn_gate.weight", d_ff, d_model)
        add(f"blk.{i}.ffn_up.weight", d_ff, d_model)
        add(f"blk.{i}.ffn_down.weight", d_model, d_ff)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def served(path: str, threads: int, rows: int):
    """llama.cpp's server with the model, in this process; messages of it go to the standard error."""
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = 4096 if rows == 1 else 512 * rows
    params.n_batch = params.n_ubatch = 1024
    params.n_parallel = rows
    params.warmup = True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    return xllamacpp.Server(params)


def main() -> None:
    """Answer until the input ends."""
    # Its own lines go where the answers would.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    *sizes, kind, threads, rows = sys.stdin.readline().split()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.gguf")
        write(path, kind, *map(int, sizes))
        server = served(path, int(threads), int(rows))
    print(f"llama.cpp (xllamacpp {xllamacpp.__version__}): {xllamacpp.get_system_info()}", file=answers)

    def complete(token: int, tokens: int, made: int, cached: bool) -> None:
        asked = {"prompt": [token] * tokens, "n_predict": made, "cache_prompt": cached, "ignore_eos": True}
        found = server.handle_completions({**asked, "temperature": 0, "samplers": ["temperature"]})
        times = found["timings"]
        if times["predicted_n"] != made or not (cached or times["prompt_n"] == tokens):
            raise SystemExit(f"llama.cpp: {found}")

    with ThreadPoolExecutor(int(rows)) as users:
        for line in sys.stdin:
            what, *counts = line.split()
            begun = time.process_time()
            if what == "generate":
                complete(5, int(counts[0]), int(counts[1]), False)
            else:
                # The last token of a prompt that is in the cache is read again, which makes the first token. Every
                # sequence has a token of its own, by which the server finds its cache.
                made = int(counts[0])
                for done in [users.submit(complete, 5 + row, CONTEXT, made, True) for row in range(int(rows))]:
                    done.result()
            print(time.process_time() - begun, file=answers)


if __name__ == "__main__":
    main()
