//! Files that people write.

use std::cell::RefCell;
use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use rustix::fs::{MemfdFlags, memfd_create};

use crate::config::{self, Config};

thread_local! {
    /// One file for all runs: what reads by a path needs one.
    static FILE: RefCell<File> =
        RefCell::new(memfd_create("fuzz", MemfdFlags::CLOEXEC).expect("a memfd").into());
}

/// A file that holds this, until the next call.
fn holding(content: &[u8]) -> PathBuf {
    FILE.with_borrow_mut(|file| {
        file.set_len(0).and_then(|()| file.rewind()).and_then(|()| file.write_all(content)).expect("memory");
        format!("/proc/self/fd/{}", file.as_raw_fd()).into()
    })
}

/// A config file: what is accepted comes out of a snapshot as it went in, and what is not is told without control
/// characters.
pub fn config(content: &[u8]) {
    let path = holding(content);
    // It looks at less than the whole.
    let socket = config::control_socket(&path).map_err(|errors| told(&errors));
    match config::load(&path) {
        Ok(config) => {
            assert_eq!(socket.ok(), Some(config.control.socket.clone()), "two readers, two sockets");
            let text = serde_json::to_vec(&config).expect("a config is plain data");
            let again: Config = serde_json::from_slice(&text).expect("what was written is read");
            assert_eq!(again, config);
            assert_eq!(config.expand_command(1, 0).len(), config.app.command.len());
            assert_eq!(config.expand_check(1).len(), config.upgrade.check.len());
        }
        Err(errors) => told(&errors),
    }
}

fn told(errors: &config::ConfigErrors) {
    let (whole, line) = (errors.to_string(), errors.summary());
    assert!(!whole.is_empty() && !line.is_empty(), "refused without a word");
    assert!(!whole.contains(|c: char| c.is_control() && c != '\n'), "{whole:?}");
    assert!(!line.contains(char::is_control), "{line:?}");
}

/// An `app.environment_file`: what comes out of it can be given to `execve`.
pub fn environment_file(content: &[u8]) {
    thread_local! {
        static CONFIG: Config = config::load(&holding(SMALLEST)).expect("it is one");
    }
    let mut app = CONFIG.with(|config| config.app.clone());
    app.environment_file = Some(holding(content));
    match app.variables() {
        Ok(variables) => {
            for (name, value) in variables {
                assert!(!name.is_empty() && !name.contains(['=', '\0']), "{name:?}");
                assert!(!value.contains(['\0', '\n']), "{name}: {value:?}");
            }
        }
        Err(error) => assert!(!error.to_string().contains(char::is_control), "{error:?}"),
    }
}

const SMALLEST: &[u8] = b"[app]\ncommand = [\"/bin/web\"]\n[[listen]]\naddress = \"127.0.0.1:80\"\n";
