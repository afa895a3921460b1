//! Real daemons and clients, wrapped, between namespaces.
//!
//! [`Net`] is a network of named hosts, each a network namespace; [`Host`] is one of them (or this machine
//! itself) with a state folder and a policy; [`Running`] a program on it. All of them clean up when they are
//! dropped, also after a panic; what a killed test run left behind, the next one removes.

pub mod built;
pub mod daemons;
pub mod ftp;
mod host;
mod net;
pub mod stock;
pub mod trust;
mod wait;
pub mod wire;

pub use host::{Finished, Host, Running};
pub use net::Net;
pub use wait::{eventually, until};

/// Policy under which nothing is refused.
pub const ALLOW_ALL: &str = "allow *(*, *);\n";
