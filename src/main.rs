//! Zero-downtime hot-upgrade process manager for SO_REUSEPORT services on Linux.

mod check;
mod cli;
mod config;

use std::process::ExitCode;

use cli::Action;

fn main() -> ExitCode {
    match cli::parse() {
        Action::Check { config } => check::run(&config),
        Action::Run { config, .. } => match config::load(&config) {
            Ok(_) => ExitCode::FAILURE,
            Err(errors) => {
                eprintln!("{errors}");
                ExitCode::from(2)
            }
        },
        _ => ExitCode::FAILURE,
    }
}
