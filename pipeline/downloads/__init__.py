"""Download images over HTTP in parallel, with limits of time and of requests to each host, retries and checks.

Input: URLs and `DownloadConfig`. Output: the bytes of each image, or a reason code.
Knows nothing of sources and stages. The only package of the pipeline that opens HTTP connections.
Start with downloader.py.
"""
