//! claude-lb: a small synchronous proxy that spreads Claude Code over several Databricks workspaces.

pub mod access;
pub mod anthropic;
pub mod balancer;
pub mod cli;
pub mod config;
pub mod env;
pub mod front;
pub mod http;
pub mod messages;
pub mod outcome;
pub mod relay;
pub mod retry;
pub mod secret;
pub mod upstream;
