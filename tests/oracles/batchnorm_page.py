"""What Keras, TensorFlow, ONNX and OpenCV print for the blocks of docs/batchnorm.md, and its record.

Without an argument it runs the blocks and holds what they print against the page and the record; with --record it
writes the record.
"""

from __future__ import annotations

import json
import os
import sys

from tests.places import INTEROP

REQUIREMENTS = [
    "torch==2.13.0", "keras==3.15.1", "tensorflow-cpu==2.21.0", "tf_keras==2.21.0", "onnx==1.23.2",
    "opencv-python-headless==4.14.0.94", "numpy",
]  # fmt: skip
RECORDED = INTEROP / "batchnorm_page.json"


def main() -> int:
    """Run the blocks; record them, or hold them against the record."""
    os.environ["KERAS_BACKEND"] = "torch"
    os.environ["TF_USE_LEGACY_KERAS"] = "1"  # tf.compat.v1.layers are made of it
    from tests.documentation.batchnorm_page import read_blocks

    printed = []
    for block in read_blocks():
        if block.framework:
            output = block.run()
            printed.append({"framework": block.framework, "code": block.code, "output": output})
            if output != block.output:
                print(f"the page shows\n{block.output}but {block.framework} printed\n{output}")
                return 1
    if "--record" in sys.argv:
        RECORDED.write_text(json.dumps(printed, indent=1) + "\n")
    if json.loads(RECORDED.read_text()) != printed:
        print("the page was changed; run with --record")
        return 1
    print(f"{len(printed)} blocks print what the page shows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
