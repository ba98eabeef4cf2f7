"""What a user of each command might bring, as small as can be: `python -m tools.tests.tiny_inputs FOLDER`."""

import json
import sys
from pathlib import Path

import numpy as np

SENTENCES = [
    f"the {noun} {verb} near the {place}"
    for noun in ("moon", "river", "old house", "ship")
    for verb in ("shines", "waits", "sleeps", "moves")
    for place in ("harbour", "wood", "hill")
]


def write(folder: Path) -> None:
    """Images in class folders with COCO boxes, a text and its tokenizer, BERT, BART, vectors."""
    _images(folder / "images")
    (folder / "text.txt").write_text("\n".join(SENTENCES) + "\n")
    _beir(folder / "beir")
    np.save(folder / "vectors.npy", np.random.default_rng(0).normal(size=(20, 8)))
    _models(folder)


def _images(folder: Path) -> None:
    from PIL import Image

    generator = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for number, label in enumerate(("bright", "dark") * 6):
            (folder / split / label).mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 80, (48, 48, 3))
            pixels[12:36, 12:36] += 150 if label == "bright" else 60
            Image.fromarray(pixels.astype(np.uint8)).save(folder / split / label / f"{number}.png")
        images = sorted(path.relative_to(folder / split) for path in (folder / split).glob("*/*.png"))
        boxes = [
            {"id": n, "image_id": n, "category_id": 1 + ("dark" in str(image)), "bbox": [12, 12, 24, 24],
             "area": 576, "iscrowd": 0}
            for n, image in enumerate(images, 1)
        ]  # fmt: skip
        named = [
            {"id": n, "file_name": str(image), "width": 48, "height": 48} for n, image in enumerate(images, 1)
        ]
        kinds = [{"id": 1, "name": "bright"}, {"id": 2, "name": "dark"}]
        text = json.dumps({"images": named, "annotations": boxes, "categories": kinds})
        (folder / f"{split}.json").write_text(text)


def _beir(folder: Path) -> None:
    (folder / "qrels").mkdir(parents=True)
    passages = [{"_id": f"d{n}", "title": "", "text": text} for n, text in enumerate(SENTENCES)]
    queries = [{"_id": f"q{n}", "text": text} for n, text in enumerate(SENTENCES[:6])]
    for name, rows in (("corpus", passages), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judged = "".join(f"q{n}\td{n}\t1\n" for n in range(6))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)


def _models(folder: Path) -> None:
    import torch
    import transformers as hf
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    words = sorted({word for sentence in SENTENCES for word in sentence.split()})
    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate(special + words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        cls_token="<s>", sep_token="</s>", model_max_length=64,
    )  # fmt: skip
    torch.manual_seed(0)
    ends = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    bert = hf.BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64, **ends,
    )  # fmt: skip
    bart = hf.BartConfig(
        vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=64,
        decoder_start_token_id=2, forced_eos_token_id=2, **ends,
    )  # fmt: skip
    for name, model in (("bert", hf.BertModel(bert)), ("bart", hf.BartForConditionalGeneration(bart))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
