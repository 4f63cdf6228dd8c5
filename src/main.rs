//! Zero-downtime hot-upgrade process manager for SO_REUSEPORT services on Linux.
#![forbid(unsafe_code)]

mod check;
mod cli;
mod client;
mod config;
mod doctor;
mod force;
mod keeper;
mod master;
mod sockets;
mod unix_file;

use std::process::ExitCode;

use cli::Action;

fn main() -> ExitCode {
    match cli::parse() {
        Action::Run { config, log_format, log_level } => master::run(&config, log_format, log_level),
        Action::TakeOver { config, pid, log_format, log_level } => {
            master::take_over(&config, pid, log_format, log_level)
        }
        Action::Check { config } => check::run(&config),
        Action::Status { master, json } => client::status(&master, json),
        Action::Receipts { master, json } => client::receipts(&master, json),
        Action::Upgrade { master, force, stay } => client::upgrade(&master, force, &stay),
        Action::Rollback { master, stay } => client::rollback(&master, &stay),
        Action::Scale { master, workers, wait, timeout } => client::scale(&master, workers, wait, timeout),
        Action::RestartWorker { master, seat, wait, timeout } => {
            client::restart_worker(&master, seat, wait, timeout)
        }
        Action::Sockets { master, json } => sockets::run(&master, json),
        Action::Doctor { config, json } => doctor::run(config.as_deref(), json),
        Action::Stop { master, wait } => client::stop(&master, wait),
        Action::StopLeftBehind { master } => client::stop_left_behind(&master),
        Action::Reexec { master } => client::reexec(&master),
        Action::Preflight => master::preflight(),
        Action::Keeper => keeper::run(),
    }
}
