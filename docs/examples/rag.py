"""Answer questions about a folder of text, with documents that were prefilled once.

    python rag.py docs "What survives a power cut?" "How is a block named?"

Documents are cut into chunks, and the KV of each is computed and stored once. BM25 finds the chunks
that a question needs; the engine takes them from the cache, moves their keys to where they stand in
this prompt, and computes again only the tokens that drifted and that the question looks at.

Needs `pip install bm25s`, and a model (`ucm model pull smollm2-135m`). With a daemon, replace
`lambda: ucm.open(...)` by `lambda: ucm.client.connect(SOCKET, timeout_s=2.0)`. On cores that others
use too, set OMP_WAIT_POLICY=PASSIVE, as `ucm` does.
"""

import argparse
import sys
from pathlib import Path

import bm25s

import ucm
from ucm import model_hub
from ucm.connectors.cached_engine import CachedEngineOptions, open_engine
from ucm.connectors.chunk_store import store_chunks
from ucm.engine.chunk_prompts import ChunkPrompts
from ucm.engine.engine import Engine, EngineOptions
from ucm.engine.loading import load_model
from ucm.engine.sampling import SamplingParams
from ucm.reuse.options import BlendOptions, ReuseOptions
from ucm.text_files import TextFile, find_files, read_text


def parse_arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description="Answer questions about a folder of text.")
    parser.add_argument("folder", type=Path, help="a folder of text files")
    parser.add_argument("questions", nargs="+", metavar="question")
    parser.add_argument("--model", default="smollm2-135m", help="a name or a folder")
    parser.add_argument("--store", type=Path, default=Path("rag-store"), help="where KV is kept")
    parser.add_argument("--top", type=int, default=4, help="chunks for a question")
    parser.add_argument("--recompute", type=float, default=0.18, help="share of the work, 0 to 1")
    parser.add_argument("--max-tokens", type=int, default=48)
    return parser.parse_args()


def documents(folder: Path) -> list[TextFile]:
    """Every text file of the folder; what is none is named and left out."""
    files, skipped = find_files([folder], root=folder)
    read = [read_text(file, root=folder) for file in files]
    for each in [*skipped, *(each for each in read if not isinstance(each, TextFile))]:
        print(f"left out {each.name}: {each.detail}")
    return [each for each in read if isinstance(each, TextFile)]


class Retriever:
    """The chunks of all documents, found by the words that they share with a question."""

    def __init__(self, texts: list[str]) -> None:
        self._bm25 = bm25s.BM25()
        self._bm25.index(self._words(texts), show_progress=False)
        self._num_texts = len(texts)

    def best(self, question: str, count: int) -> list[int]:
        """Indexes of the best texts, the best last: next to the question."""
        count = min(count, self._num_texts)
        found, _ = self._bm25.retrieve(self._words([question]), k=count, show_progress=False)
        return [int(index) for index in reversed(found[0])]

    def _words(self, texts: list[str]) -> bm25s.tokenization.Tokenized:
        return bm25s.tokenize(texts, stopwords="en", show_progress=False)


arguments = parse_arguments()
loaded = load_model(model_hub.resolve(arguments.model))
tokenizer = loaded.tokenizer
prompts = ChunkPrompts(tokenizer)  # the same for all prompts: chunks are encoded behind its opening
reuse = ReuseOptions(
    sink_tokens=prompts.sink_tokens, blend=BlendOptions(budget=arguments.recompute)
)
options = CachedEngineOptions(engine=EngineOptions(reuse=reuse))
greedy = SamplingParams(max_tokens=arguments.max_tokens)

with open_engine(loaded, lambda: ucm.open(arguments.store), options) as cached:
    # Index: cut, prefill what is new, remember the words.
    chunks, sources = [], []
    for document in documents(arguments.folder):
        cut = prompts.chunks_of(document.text, cached.engine.chunk_space)
        stored = store_chunks(cached, cut)
        print(f"{document.name}: {stored.num_computed} chunks computed, {stored.num_known} known")
        chunks += cut
        sources += [document.name] * len(cut)
    if not chunks:
        sys.exit(f"there is no text in {arguments.folder}")
    retriever = Retriever([tokenizer.decode(chunk.token_ids) for chunk in chunks])

    # Answer, with the pool emptied before each question: chunks come from the cache.
    exact_engine = Engine(loaded.model, tokenizer)  # computes all of it, to compare with
    for question in arguments.questions:
        best = retriever.best(question, arguments.top)
        prompt = prompts.prompt([chunks[index] for index in best], question)
        cached.engine.reset_cache()
        (result,) = cached.engine.generate_all([prompt], greedy)
        exact_engine.reset_cache()
        (exact,) = exact_engine.generate_all([prompt.token_ids], greedy)

        used, ttft_s = result.reuse, result.timings.ttft_s
        print(f"\nquestion    {question}")
        print(f"answer      {result.outputs[0].text.strip()}")
        print(f"computed    {exact.outputs[0].text.strip()}")
        print(f"from        {', '.join(dict.fromkeys(sources[index] for index in best))}")
        print(f"prompt      {len(prompt):,} tokens, {used.num_chunk_tokens:,} of them reused")
        print(f"recomputed  {used.num_recomputed_tokens:,.0f} tokens' worth ({used.cost:.0%})")
        print(f"saved       {used.num_saved_tokens:,.0f} tokens' worth")
        print(
            f"first token {1e3 * ttft_s:,.0f} ms, {1e3 * exact.timings.ttft_s:,.0f} ms in full: "
            f"{ttft_s / exact.timings.ttft_s:.2f} of it"
        )
