"""A tokenizer whose words are their own ids, "12 40 7": for models of which only the weights matter."""

from typing import Any


class NumberTokenizer:
    """Ids below 5 are special, 3 is unknown; a text ends with id 2."""

    is_fast = False
    all_special_ids = (0, 1, 2, 3, 4)
    unk_token_id = 3
    model_max_length = 160

    def __init__(self, pad_token_id: int = 1) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, text: str, add_special_tokens: bool = True, **options: Any) -> dict[str, list[int]]:
        ids = [int(word) if word.isdigit() else 3 for word in text.split()]
        if add_special_tokens:
            limit = options["max_length"] if options.get("truncation") else len(ids) + 1
            ids = [*ids[: limit - 1], 2]
        return {"input_ids": ids, "special_tokens_mask": [int(i in self.all_special_ids) for i in ids]}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [str(i) for i in ids]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return " ".join(tokens)

    def batch_decode(self, rows: Any, skip_special_tokens: bool = True) -> list[str]:
        return [" ".join(str(i) for i in row.tolist() if i not in self.all_special_ids) for row in rows]
