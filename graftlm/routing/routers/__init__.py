"""ADAPTER_ROUTERS: the table of every router. A new router is its file, its line here, and its test."""

from dataclasses import dataclass

from graftlm.routing.base import RequestRouter, RouterConfig, StepRouter, TokenRouter
from graftlm.routing.routers.arrow import Arrow, ArrowConfig
from graftlm.routing.routers.centroids import CentroidsConfig, TokenCentroids
from graftlm.routing.routers.classifier import Classifier, ClassifierConfig
from graftlm.routing.routers.elrea import Elrea, ElreaConfig
from graftlm.routing.routers.in_turn import InTurn, InTurnConfig
from graftlm.routing.routers.lag import Lag, LagConfig
from graftlm.routing.routers.mean_logits import MeanLogits, MeanLogitsConfig
from graftlm.routing.routers.phatgoose import Phatgoose, PhatgooseConfig
from graftlm.routing.routers.prompt_scale import PromptScale, PromptScaleConfig
from graftlm.routing.routers.retriever import Retriever, RetrieverConfig
from graftlm.routing.routers.spectr import Spectr, SpectrConfig
from graftlm.routing.routers.tasks import Tasks, TasksConfig


@dataclass(frozen=True)
class AdapterRouter:
    """A row of the table: the config that names the router, and the router that it makes."""

    config: type[RouterConfig]
    router: type[TokenRouter] | type[RequestRouter] | type[StepRouter]


ADAPTER_ROUTERS: dict[str, AdapterRouter] = {
    "arrow": AdapterRouter(ArrowConfig, Arrow),
    "centroids": AdapterRouter(CentroidsConfig, TokenCentroids),
    "classifier": AdapterRouter(ClassifierConfig, Classifier),
    "elrea": AdapterRouter(ElreaConfig, Elrea),
    "in-turn": AdapterRouter(InTurnConfig, InTurn),
    "lag": AdapterRouter(LagConfig, Lag),
    "mean-logits": AdapterRouter(MeanLogitsConfig, MeanLogits),
    "phatgoose": AdapterRouter(PhatgooseConfig, Phatgoose),
    "prompt-scale": AdapterRouter(PromptScaleConfig, PromptScale),
    "retriever": AdapterRouter(RetrieverConfig, Retriever),
    "spectr": AdapterRouter(SpectrConfig, Spectr),
    "tasks": AdapterRouter(TasksConfig, Tasks),
}
