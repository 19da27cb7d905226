"""From encoded bytes to model input: decoding, crops in the worker, augmentation on the device."""
