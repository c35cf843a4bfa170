"""Answer questions about a folder of text, with documents that were prefilled once.

    python rag.py docs "What survives a power cut?" "How is a block named?"

Documents are cut into chunks, and the KV of each is computed and stored once. BM25 finds the chunks
that a question needs; the engine takes them from the cache, moves their keys to where they stand in
this prompt, and computes again only the tokens that drifted and that the question looks at.

The model is a toy: 135 million parameters show what reuse costs and saves, not good answers.
Compare each answer with the one "in full" below it, or name another model with --model.

Needs `pip install bm25s`, and a model (`ucm model pull smollm2-135m`). With a daemon, import
`connect` from `ucm.client` and replace `lambda: ucm.open(...)` by
`lambda: connect(SOCKET, timeout_s=2.0)`. On cores that others use too, set OMP_WAIT_POLICY=PASSIVE,
as `ucm` does.
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
from ucm.engine.request import RequestResult
from ucm.engine.sampling import SamplingParams
from ucm.engine.tokenizer import Tokenizer
from ucm.errors import UcmError
from ucm.reuse.encoding_context import CONTEXT_TOKENS, sample_context
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
    arguments = parser.parse_args()
    if arguments.top < 1:
        parser.error("--top is at least 1")
    return arguments


def documents(folder: Path) -> list[TextFile]:
    """Every text file of the folder; what is none is named and left out."""
    files, skipped = find_files([folder], root=folder)
    read = [read_text(file, root=folder) for file in files]
    for each in [*skipped, *(each for each in read if not isinstance(each, TextFile))]:
        print(f"left out {each.name}: {each.detail}")
    return [each for each in read if isinstance(each, TextFile)]


def context(file: Path, texts: list[TextFile], tokenizer: Tokenizer) -> list[int]:
    """What chunks are encoded behind: a sample of the documents, that of the first time for ever.

    With another one every chunk has another name, and is computed again.
    """
    if not file.exists():
        tokens = sample_context([tokenizer.encode_plain(text.text) for text in texts])
        if not tokens:  # too little text as yet: none, until there is more
            return []
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_suffix(".tmp")
        fresh.write_text(tokenizer.decode(tokens), encoding="utf-8")
        fresh.replace(file)
    return tokenizer.encode_plain(file.read_text(encoding="utf-8"))[-CONTEXT_TOKENS:]


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


def main(arguments: argparse.Namespace) -> None:
    """Index the folder, then answer."""
    loaded = load_model(model_hub.resolve(arguments.model))
    texts = documents(arguments.folder)
    if not texts:
        sys.exit(f"there is no text in {arguments.folder}")
    # The same for all prompts: chunks are encoded behind its opening, and text of their kind.
    sample = context(Path(f"{arguments.store}.context.txt"), texts, loaded.tokenizer)
    prompts = ChunkPrompts(loaded.tokenizer, context=sample)
    reuse = ReuseOptions(
        sink_tokens=prompts.sink_tokens, blend=BlendOptions(budget=arguments.recompute)
    )
    options = CachedEngineOptions(engine=EngineOptions(reuse=reuse))
    greedy = SamplingParams(max_tokens=arguments.max_tokens)
    with open_engine(loaded, lambda: ucm.open(arguments.store), options) as cached:
        # Index: cut, prefill what is new, remember the words.
        chunks, sources = [], []
        for text in texts:
            cut = prompts.chunks_of(text.text, cached.engine.chunk_space)
            stored = store_chunks(cached, cut)
            print(f"{text.name}: {stored.num_computed} chunks computed, {stored.num_known} known")
            chunks += cut
            sources += [text.name] * len(cut)
        retriever = Retriever([loaded.tokenizer.decode(chunk.token_ids) for chunk in chunks])

        # Answer, with the pool emptied before each question: chunks come from the cache.
        exact_engine = Engine(loaded.model, loaded.tokenizer)  # computes all of it, to compare with
        for question in arguments.questions:
            best = retriever.best(question, arguments.top)
            prompt = prompts.prompt([chunks[index] for index in best], question)
            cached.engine.reset_cache()
            (result,) = cached.engine.generate_all([prompt], greedy)
            exact_engine.reset_cache()
            (exact,) = exact_engine.generate_all([prompt.token_ids], greedy)
            print(f"\nquestion    {question}")
            print(f"from        {', '.join(dict.fromkeys(sources[index] for index in best))}")
            show(result, exact)


def show(result: RequestResult, exact: RequestResult) -> None:
    """What was answered, and what reuse saved of a full prefill of the same prompt."""
    used, ttft_s, full_s = result.reuse, result.timings.ttft_s, exact.timings.ttft_s
    print(f"answer      {result.outputs[0].text.strip()}")
    print(f"in full     {exact.outputs[0].text.strip()}")
    if used.fallback is not None:
        print(f"computed    all of it, nothing was reused: {used.fallback.value}")
    num_tokens = len(result.prompt_token_ids)
    print(f"prompt      {num_tokens:,} tokens, {used.num_chunk_tokens:,} of them reused")
    print(f"recomputed  {used.num_recomputed_tokens:,.0f} tokens' worth ({used.cost:.0%})")
    print(f"saved       {used.num_saved_tokens:,.0f} tokens' worth")
    times = f"{1e3 * ttft_s:,.0f} ms, {1e3 * full_s:,.0f} ms in full"
    print(f"first token {times}: {ttft_s / full_s:.2f} of it")


if __name__ == "__main__":
    try:
        main(parse_arguments())
    except UcmError as error:
        sys.exit(f"rag.py: {error}")
