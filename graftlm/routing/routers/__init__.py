"""ADAPTER_ROUTERS: the table of every router. A new router is its file, its line here, and its test."""

from dataclasses import dataclass

from graftlm.routing.base import RequestRouter, RouterConfig, TokenRouter
from graftlm.routing.routers.arrow import Arrow, ArrowConfig
from graftlm.routing.routers.lag import Lag, LagConfig
from graftlm.routing.routers.phatgoose import Phatgoose, PhatgooseConfig
from graftlm.routing.routers.retriever import Retriever, RetrieverConfig
from graftlm.routing.routers.spectr import Spectr, SpectrConfig
from graftlm.routing.routers.tasks import Tasks, TasksConfig


@dataclass(frozen=True)
class AdapterRouter:
    """A row of the table: the config that names the router, and the router that it makes."""

    config: type[RouterConfig]
    router: type[TokenRouter] | type[RequestRouter]


ADAPTER_ROUTERS: dict[str, AdapterRouter] = {
    "arrow": AdapterRouter(ArrowConfig, Arrow),
    "lag": AdapterRouter(LagConfig, Lag),
    "phatgoose": AdapterRouter(PhatgooseConfig, Phatgoose),
    "retriever": AdapterRouter(RetrieverConfig, Retriever),
    "spectr": AdapterRouter(SpectrConfig, Spectr),
    "tasks": AdapterRouter(TasksConfig, Tasks),
}
