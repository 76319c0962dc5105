"""Recording over many documents: mergeable statistics and Parquet rows, resumable, one process or
many."""

from ernie_lab.corpus.documents import Corpus, Document, read_documents
from ernie_lab.corpus.folder import CorpusError, CorpusIncomplete
from ernie_lab.corpus.ingest import RoutedDocument, decode_sglang, ingest_routed_experts
from ernie_lab.corpus.plan import RecordPlan
from ernie_lab.corpus.store import RoutingStore

__all__ = [
    "Corpus",
    "CorpusError",
    "CorpusIncomplete",
    "Document",
    "RecordPlan",
    "RoutedDocument",
    "RoutingStore",
    "decode_sglang",
    "ingest_routed_experts",
    "read_documents",
]
