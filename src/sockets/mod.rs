//! `reuseportd sockets`: what the kernel really has on each configured port, whoever it belongs to.

mod facts;
mod picture;
#[cfg(test)]
mod tests;
mod text;

use std::io::Write;
use std::process::ExitCode;

use reuseportd_wire::control;

use crate::cli::Master;
use crate::client;

/// Prints the picture. Exit code 3 when `--socket` names a master that isn't there, 2 for an invalid config.
pub(crate) fn run(master: &Master, json: bool) -> ExitCode {
    let picture = match facts::gather(master) {
        Ok(facts) => picture::of(&facts),
        Err((code, text)) => {
            let heading = if text.starts_with("error:") { "" } else { "error: " };
            eprintln!("{heading}{text}");
            return ExitCode::from(code);
        }
    };
    let text = match json {
        true => client::text::escape_json(&control::encode(&picture).unwrap_or_default()),
        false => text::render(&picture, client::paint()),
    };
    // A reader that has seen enough (`| head -1`) is no failure.
    let _ = std::io::stdout().write_all(text.as_bytes());
    ExitCode::SUCCESS
}
