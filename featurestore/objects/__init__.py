"""Named bytes of a store: in a folder, a bucket, a web address or a repository of the Hub."""
