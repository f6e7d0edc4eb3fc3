//! One integration binary over real sockets and the built program.
