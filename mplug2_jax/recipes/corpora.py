"""The public corpora of the paper's pretraining: what they are, where they come from, and how their files are read."""

import dataclasses
from collections.abc import Mapping

from data_pipelines.config import Format, Kind, SourceConfig
from mplug2_jax.recipes.base import file_source

FETCH_IMAGES = (
    "img2dataset --url_list {table} --input_format {format} --url_col {url} --caption_col {caption} "
    "--output_format webdataset --output_folder $MPLUG2_DATA/{folder} --processes_count 16 --thread_count 64 "
    "--image_size 256"
)
CHUNK = (
    "mplug2 data chunk {files} --tokenizer $MPLUG2_DATA/bert-large-uncased/vocab.txt --length 128 --shards {shards} "
    "--out $MPLUG2_DATA/{folder}"
)
MANY_WORKERS = "or the same by many workers: mplug2 launch slurm --workers {shards} -- data chunk ..."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """A public corpus. Paths are relative to the data folder.

    Attributes:
        title: what it is.
        kind: what its records are read as.
        size: the images, videos or bytes that the paper counts.
        weight: in the mixture of its stream: millions of texts, or gigabytes of them.
        format: of its files.
        path: of its files.
        media: folder of the images that the files name.
        split: of the files.
        homepage: where it comes from.
        licence: what its owners allow.
        fetch: commands that make the files, in order.
    """

    title: str
    kind: Kind
    size: str
    weight: float
    format: Format
    path: str
    media: str = ""
    split: str = ""
    homepage: str
    licence: str
    fetch: tuple[str, ...]

    def source(self) -> SourceConfig:
        """Return the source that reads it from the data folder."""
        source = file_source(self.kind, self.path, self.media, format=self.format, split=self.split)
        return dataclasses.replace(source, weight=self.weight)


CORPORA: Mapping[str, Corpus] = {
    "coco": Corpus(
        title="COCO captions, Karpathy's training split", kind="image", size="113K images, 567K texts",
        weight=0.567, format="karpathy", path="coco/dataset_coco.json", media="coco", split="train+restval",
        homepage="https://cocodataset.org/#download",
        licence="captions CC BY 4.0; images under the terms of Flickr",
        fetch=(
            "coco/dataset_coco.json: https://cs.stanford.edu/people/karpathy/deepimagesent",
            "coco/train2014, coco/val2014: http://images.cocodataset.org/zips/train2014.zip and val2014.zip",
        ),
    ),
    "vg": Corpus(
        title="Visual Genome captions", kind="image", size="100K images, 769K texts", weight=0.769,
        format="annotations", path="vg/vg_caption.json", media="vg",
        homepage="https://homes.cs.washington.edu/~ranjay/visualgenome/api.html",
        licence="CC BY 4.0; images under the terms of Flickr",
        fetch=(
            "vg/vg_caption.json: https://storage.googleapis.com/sfr-vision-language-research/datasets/vg_caption.json",
            "vg/VG_100K, vg/VG_100K_2: the images of version 1.2, from the homepage",
        ),
    ),
    "sbu": Corpus(
        title="SBU captions", kind="image", size="860K images, 860K texts", weight=0.86, format="webdataset",
        path="sbu/*.tar", homepage="https://www.cs.rice.edu/~vo9/sbucaptions",
        licence="links to images under the terms of Flickr",
        fetch=(
            "wget https://www.cs.rice.edu/~vo9/sbucaptions/sbu-captions-all.tar.gz && tar -xzf sbu-captions-all.tar.gz",
            FETCH_IMAGES.format(
                table="sbu-captions-all.json", format="json", url="image_urls", caption="captions", folder="sbu"
            ),
        ),
    ),
    "cc3m": Corpus(
        title="Conceptual Captions", kind="image", size="3M images, 3M texts", weight=3.0, format="webdataset",
        path="cc3m/*.tar", homepage="https://ai.google.com/research/ConceptualCaptions/download",
        licence="captions may be used freely if Google is acknowledged; images belong to their owners",
        fetch=(
            "cc3m.tsv: from the homepage; then: sed -i '1s/^/caption\\turl\\n/' cc3m.tsv",
            FETCH_IMAGES.format(table="cc3m.tsv", format="tsv", url="url", caption="caption", folder="cc3m"),
        ),
    ),
    "cc12m": Corpus(
        title="Conceptual 12M", kind="image", size="10M images, 10M texts", weight=10.0, format="webdataset",
        path="cc12m/*.tar", homepage="https://github.com/google-research-datasets/conceptual-12m",
        licence="captions may be used freely if Google is acknowledged; images belong to their owners",
        fetch=(
            "wget https://storage.googleapis.com/conceptual_12m/cc12m.tsv && sed -i '1s/^/url\\tcaption\\n/' cc12m.tsv",
            FETCH_IMAGES.format(table="cc12m.tsv", format="tsv", url="url", caption="caption", folder="cc12m"),
        ),
    ),
    "webvid2m": Corpus(
        title="WebVid-2M", kind="video", size="2M videos, 2M texts", weight=2.0, format="webdataset",
        path="webvid2m/*.tar", homepage="https://github.com/m-bain/webvid",
        licence="research without commercial purpose; its authors no longer distribute the list of URLs",
        fetch=(
            "results_2M_train.csv: columns videoid, contentUrl, name, ...; who has it may still use it",
            "video2dataset --url_list results_2M_train.csv --input_format csv --output-format webdataset "
            "--output_folder $MPLUG2_DATA/webvid2m --url_col contentUrl --caption_col name",
        ),
    ),
    "wikipedia": Corpus(
        title="Wikipedia in English, as plain text", kind="text", size="20 GB", weight=20.0, format="array_record",
        path="wikipedia/*.array_record", homepage="https://dumps.wikimedia.org/enwiki/latest",
        licence="CC BY-SA 4.0",
        fetch=(
            "wget https://dumps.wikimedia.org/enwiki/latest/enwiki-latest-pages-articles.xml.bz2",
            "python -m wikiextractor.WikiExtractor enwiki-latest-pages-articles.xml.bz2 -o text --no-templates",
            CHUNK.format(files="text/*/wiki_*", shards=16, folder="wikipedia"), MANY_WORKERS.format(shards=16),
        ),
    ),
    "web": Corpus(
        title="English web text, cleaned (C4 in place of the paper's, which is not public)", kind="text",
        size="330 GB", weight=330.0, format="array_record", path="web/*.array_record",
        homepage="https://huggingface.co/datasets/allenai/c4", licence="ODC-BY; Common Crawl's terms of use",
        fetch=(
            "c4/en/c4-train.*.json.gz: from the homepage; then, for each: zcat FILE | jq -r .text > FILE.txt",
            CHUNK.format(files="c4/en/*.txt", shards=256, folder="web"), MANY_WORKERS.format(shards=256),
        ),
    ),
}  # fmt: skip
"""By name, as in the paper's table (arXiv 2302.00402): 14M images and 2M videos with texts, and 350 GB of text."""


def corpus_sources(kind: Kind) -> dict[str, SourceConfig]:
    """Return the sources of the corpora of a kind, by name."""
    return {name: corpus.source() for name, corpus in CORPORA.items() if corpus.kind == kind}
