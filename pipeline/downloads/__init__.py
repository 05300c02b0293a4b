"""Download images over HTTP in parallel, with time limits, retries and a check of every host.

Input: URLs and `DownloadConfig`. Output: the bytes of each image, or a reason code.
Knows nothing of sources and stages. The only package of the pipeline that opens HTTP connections.
Start with downloader.py.
"""
