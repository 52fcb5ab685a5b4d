//! `log` on the console.

use log::{LevelFilter, Log, Metadata, Record};

use crate::console;

struct Logger;

impl Log for Logger {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        console::with(|console| console.log(record.level(), *record.args()));
    }

    fn flush(&self) {
        console::with(console::Console::flush);
    }
}

/// Makes `log` write to the console.
///
/// # Panics
///
/// When called twice.
pub fn initialize() {
    static LOGGER: Logger = Logger;
    log::set_logger(&LOGGER).expect("the logger is set once");
    log::set_max_level(LevelFilter::Debug);
}
