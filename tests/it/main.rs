//! The built program over real sockets, against a scripted workspace.
//!
//! One binary, one file per behaviour. Nothing sleeps, nothing shares a port, and everything a test starts is
//! stopped by its own handle. The support has tests of its own, so that a failure here is the program's.

mod support;

mod accounting;
mod architecture;
mod attempts;
mod choosing;
mod command_line;
mod compat;
mod cooling;
mod deployment;
mod error_bodies;
mod explain;
mod failover_stream;
mod fault_sweep;
mod fuzzing;
mod hostile_bodies;
mod hostile_clients;
mod in_a_row;
mod lifecycle;
mod limits;
mod models;
mod networks;
mod outcomes;
mod panics;
mod promptness;
mod refusals;
mod relay;
mod reload;
mod replicas;
mod room;
mod routes;
mod secrets;
mod sessions;
mod shortages;
mod states;
mod support_test;
mod token_learning;
mod token_replay;
