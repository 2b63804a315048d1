"""Judging what a SavedModel does beside computing: operations of its graph by name, and code that Keras 2 left in
it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from bntool.checkpoints.checkpoint import GlobalName, GlobalTrust
from bntool.checkpoints.containers.json_texts import parse_json
from bntool.checkpoints.containers.protobufs.reading import Buffer, Message
from bntool.checkpoints.files import Folder
from bntool.checkpoints.keras.trust import judge_configuration
from bntool.errors import BntoolError

GRAPH, KERAS_METADATA = "saved_model.pb", "keras_metadata.pb"
# SavedModel, MetaGraphDef, GraphDef, FunctionDefLibrary, FunctionDef, NodeDef
_META_GRAPHS, _GRAPH_DEF, _NODES, _LIBRARY, _FUNCTIONS, _BODY, _OPERATION, _ATTRIBUTES = 2, 2, 1, 2, 1, 3, 2, 5
# operations that run Python or write files, and those that read files or take part in a cluster; the graph's own
# saving and restoring (SaveV2 and the like) is called with a path by whoever calls it
_ACTING = re.compile(
    r"PyFunc|^WriteFile|^Write\w*Summary|Summary(File|Db)Writer|^ImportEvent|ToTFRecord|^(Save|Snapshot|Cache)Dataset|"
    r"Rpc|^Debug(Identity|Nan|Numeric)|^FileSystem"
)
_READING = re.compile(
    r"^(ReadFile|MatchingFiles|LoadDataset)|Reader(V\d)?$|(TextLine|Record|Sql|LMDB)Dataset|^InitializeTableFromTextFile|"
    r"^LoadAndRemap|VocabRemapping"
)


def judge_saved_model(variables: Folder) -> Iterator[GlobalName]:
    """Yield what the files of a SavedModel name that acts, each once; what cannot be read counts as unknown.

    Args:
        variables: the folder in it that holds the variables.
    """
    found: dict[str, GlobalTrust] = {}
    as_text = variables.find(f"../{GRAPH}txt")
    if as_text is not None:
        as_text.close()
        found[f"{GRAPH}txt (a graph as text, which is not read)"] = GlobalTrust.UNKNOWN
    for name, judge in ((GRAPH, _judge_graph), (KERAS_METADATA, _judge_metadata)):
        try:
            opened = variables.find(f"../{name}")
            if opened is None:
                continue
            with opened as file:
                found.update(judge(Message(Buffer(file), 0, file.size)))
        except BntoolError as error:
            found[f"{name} ({error.message})"] = GlobalTrust.UNKNOWN
    for path, trust in found.items():
        yield GlobalName(path, called=True, trust=trust)


def _judge_graph(model: Message) -> Iterator[tuple[str, GlobalTrust]]:
    for meta in model.messages(_META_GRAPHS):
        for graph in meta.messages(_GRAPH_DEF):
            bodies = [(graph, _NODES)]
            bodies += [(one, _BODY) for library in graph.messages(_LIBRARY) for one in library.messages(_FUNCTIONS)]
            for body, number in bodies:
                for node in body.messages(number):
                    operation = node.text(_OPERATION)
                    if _ACTING.search(operation) or (operation == "PrintV2" and _writes_file(node)):
                        yield f"tensorflow.{operation}", GlobalTrust.SUSPICIOUS
                    elif _READING.search(operation):
                        yield f"tensorflow.{operation}", GlobalTrust.UNKNOWN


def _writes_file(node: Message) -> bool:
    """Return whether what is printed goes to a file."""
    for attribute in node.messages(_ATTRIBUTES):
        value = attribute.message(2)
        if attribute.text(1) == "output_stream" and value is not None and value.text(2).startswith("file:"):
            return True
    return False


def _judge_metadata(metadata: Message) -> Iterator[tuple[str, GlobalTrust]]:
    for saved in metadata.messages(1):
        text = saved.text(5)
        try:
            config = parse_json(text, allow_nan=True)
        except ValueError:
            yield f"{KERAS_METADATA} (no valid JSON)", GlobalTrust.UNKNOWN
            continue
        for one in judge_configuration(config):
            yield one.path, one.trust
