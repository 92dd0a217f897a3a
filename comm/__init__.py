"""What crosses between processes: messages, views, frames, transports, dispatch and combine."""
