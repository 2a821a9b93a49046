"""``python -m siamese_detr VERB`` is ``siamese-detr VERB``."""

import sys

from siamese_detr.cli import main

sys.exit(main())
