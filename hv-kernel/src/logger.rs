//! `log` on COM1.

use log::{Level, LevelFilter, Log, Metadata, Record};

use crate::serial;

struct Logger;

impl Log for Logger {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let label = match record.level() {
            Level::Error => "ERROR ",
            Level::Warn => "WARN  ",
            Level::Info => "",
            Level::Debug => "debug ",
            Level::Trace => "trace ",
        };
        serial::LOG.with(|port| write!(port, "{label}{}\r\n", record.args()));
    }

    fn flush(&self) {
        serial::LOG.flush();
    }
}

/// Makes `log` write to COM1.
///
/// # Panics
///
/// When called twice.
pub fn initialize() {
    static LOGGER: Logger = Logger;
    log::set_logger(&LOGGER).expect("the logger is set once");
    log::set_max_level(LevelFilter::Info);
}
