"""A store in a bucket: s3://, gs:// and az://."""
