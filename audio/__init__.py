"""How sound becomes tensors: decode and resample, manifests, HDF5 shards, packing, datasets.

The modules are imported by name (`from audio.dataset import Pack`), so that tools which only decode or pack do not pay
for importing PyTorch.
"""
