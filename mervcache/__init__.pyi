"""What editors and type checkers see: the names of `__init__.py`, from where they are defined."""

from featurestore.clips import Clip as Clip
from featurestore.clips import Sample as Sample
from featurestore.dataset import FeatureDataset as FeatureDataset
from featurestore.identity import FeatureIdentity as FeatureIdentity
from featurestore.maintenance.verify import verify_store as verify_store
from featurestore.store import FeatureStore as FeatureStore
from featurestore.transfer.sync import push as push
from featurestore.transfer.sync import transfer as pull
from jobs.settings import ClusterRequest as ClusterRequest
from mervcache.errors import MervCacheError as MervCacheError
from pipeline.config import ExtractConfig as ExtractConfig
from pipeline.config import read_config as read_extract_config
from pipeline.duplicates import find_duplicates as duplicates
from pipeline.explorer.content import Explorer as Explorer
from pipeline.explorer.server import serve as serve_explorer
from pipeline.explorer.server import write_site as write_explorer
from pipeline.extract import extract as extract
from pipeline.fiftyone import write_fiftyone as write_fiftyone
from pipeline.forecast import forecast as forecast
from pipeline.vectors import pool_clips as pool_clips
from pipeline.vectors import pool_store as vectors
from pipeline.vectors import write_vectors as write_vectors
from trainer.ablation.execute import train_sweep as sweep
from trainer.ablation.probe import probe as probe
from trainer.ablation.sweep import SweepConfig as SweepConfig
from trainer.ask import Asker as Asker
from trainer.ask import ask as ask
from trainer.config import TrainConfig as TrainConfig
from trainer.evaluate import EvaluationRequest as EvaluationRequest
from trainer.evaluate import evaluate_run as evaluate
from trainer.loop.stages import train_in_stages as train
from trainer.recipes import get_stages as get_stages
from trainer.runs.export import export_run as export_run
from trainer.runs.load import load_run as load_run

open_store = FeatureStore.open

__all__ = [
    "Asker",
    "Clip",
    "ClusterRequest",
    "EvaluationRequest",
    "Explorer",
    "ExtractConfig",
    "FeatureDataset",
    "FeatureIdentity",
    "FeatureStore",
    "MervCacheError",
    "Sample",
    "SweepConfig",
    "TrainConfig",
    "ask",
    "duplicates",
    "evaluate",
    "export_run",
    "extract",
    "forecast",
    "get_stages",
    "load_run",
    "open_store",
    "pool_clips",
    "probe",
    "pull",
    "push",
    "read_extract_config",
    "serve_explorer",
    "sweep",
    "train",
    "vectors",
    "verify_store",
    "write_explorer",
    "write_fiftyone",
    "write_vectors",
]
