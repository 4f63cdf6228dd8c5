//! The fuzz targets' way into the program: a binary has no public parts, so its modules are compiled into this crate as
//! they are. What a target can reach without them is in the target itself.

// Of the program only what the master needs is here, and of that not all is called.
#[allow(dead_code, unused_imports, reason = "what only main and the clients call")]
mod client;
#[allow(dead_code, unused_imports, reason = "what only main and the clients call")]
#[path = "../../src/config/mod.rs"]
mod config;
#[allow(dead_code, unused_imports, reason = "what only main and the clients call")]
#[path = "../../src/force.rs"]
mod force;
#[allow(dead_code, unused_imports, reason = "what only main and the clients call")]
#[path = "../../src/keeper/mod.rs"]
mod keeper;
#[allow(dead_code, unused_imports, reason = "what only main and the clients call")]
#[path = "../../src/master/mod.rs"]
mod master;
#[allow(dead_code, unused_imports, reason = "what only main and the clients call")]
#[path = "../../src/unix_file.rs"]
mod unix_file;

mod file;
mod happening;
pub mod play;

pub use file::{config, environment_file};
pub use master::fuzz::{journal, output, snapshot, status};
