"""What transformers' own from_pretrained does because of a path or a keyword: done here too, or refused by name.

    arguments.py      every keyword it takes, and what becomes of it here
    download.py       a repository on the Hub -> a folder with the files that are read, and no others
    weight_files.py   subfolder, variant, transformers_weights, index  ->  the safetensors files that count
    skeleton.py       config.json and overrides -> configuration, class, dtype -> the model on the meta device
    remote_code.py    auto_map and trust_remote_code -> the class that comes with the checkpoint, or a refusal
    own_class.py      such a class, built without bytes for its parameters, and filled
    dense.py          that model with its dense weights loaded, its generation defaults and its adapter

transformers itself is handed a state dict and no path, so nothing of this happens by itself.
"""
