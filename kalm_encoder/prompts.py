"""The exact strings KaLM-Reranker-V1 was trained on. One changed character changes every score.

Their source is the published `kalm_reranker.py` of KaLM-Embedding/KaLM-Reranker-V1-Nano. This
module knows nothing of tokenizers or models.
"""

DOCUMENT_PREFIX = "<Document>: "

DEFAULT_SYSTEM_INSTRUCTION = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".'
)

DEFAULT_INSTRUCTION = "Given a query, retrieve documents that answer the query."

TEMPLATE = DOCUMENT_PREFIX + "{passage}"
"""The passage template as a table records it. It serves as a name and is never formatted."""


def render_passage(text: str) -> str:
    """Return the text that the encoder reads. An empty passage is legal: its prefix is encoded."""
    return DOCUMENT_PREFIX + text


def render_query(
    query: str,
    instruction: str = DEFAULT_INSTRUCTION,
    system_instruction: str = DEFAULT_SYSTEM_INSTRUCTION,
) -> str:
    """Return the decoder prompt, with the special tokens written out as text.

    Args:
        query: Query that is already cut to its token limit.
        instruction: Description of the task; the score of a pair depends on it.
        system_instruction: What the model is told before the task; the score depends on it too.
    """
    beginning = before_query(instruction, system_instruction)
    return f"{beginning} {query}<end_of_turn>\n<start_of_turn>model\n\n\n\n"


def before_query(
    instruction: str = DEFAULT_INSTRUCTION, system_instruction: str = DEFAULT_SYSTEM_INSTRUCTION
) -> str:
    """Return the common beginning of all prompts with these instructions, up to the space."""
    start = f"<bos><start_of_turn>user\n{system_instruction}\n\n"
    return f"{start}<Instruct>: {instruction}\n<Query>:"
