def write(root, out):
    pass
