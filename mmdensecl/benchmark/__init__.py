# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
