//! States that must not be, for `verify` to notice: every reachable one with one thing wrong.

use std::format;
use std::sync::atomic::AtomicU32;

use super::hardware::{BIT, Kind};
use super::system::{Broken, Config, OTHER, System};
use crate::smt::CoreState;
use crate::{Core, SldMode};

const NOTICES: &str = "verify notices what is wrong";

impl<const C: usize, const V: usize> System<C, V> {
    /// Damages this state, a good one, in all ways that one CPU can know of.
    pub fn check_damage(&self, config: &Config<C, V>) -> Result<(), Broken> {
        for cpu in 0..C {
            let Some(runs) = self.running[cpu] else { continue };
            let index = config.core_of[cpu];
            let notices = |what, config: &Config<C, V>, damage: &dyn Fn(&mut Self)| {
                let mut damaged = self.clone();
                damage(&mut damaged);
                match damaged.verify(config, cpu, runs)? {
                    Ok(()) => Err(Broken { invariant: NOTICES, detail: format!("{cpu}: {what}") }),
                    Err(_) => Ok(()),
                }
            };
            notices("the CPU's flag", config, &|s| s.cpus[cpu].disabled ^= true)?;
            if !config.kinds[index].works() {
                continue;
            }
            notices("bit 29", config, &|s| s.msrs[index] ^= BIT)?;
            notices("another bit", config, &|s| s.msrs[index] ^= OTHER)?;
            let mut gone = config.clone();
            gone.kinds[index] = Kind::Hidden;
            notices("no 0x33", &gone, &|_| {})?;
            notices("bit 29, and the core", config, &|s| {
                s.msrs[index] ^= BIT;
                s.change_core(index, |core| core.on ^= true);
            })?;
            if config.mode != SldMode::Warn {
                continue;
            }
            let flag = self.flag(cpu, runs);
            let alone = self.siblings(config, cpu).next().is_none();
            // With the flag set and siblings, it is for them to know.
            if !self.core_steps(config, cpu) && (alone || !flag) {
                notices("the core's count, and bit 29 after it", config, &|s| {
                    s.msrs[index] ^= BIT;
                    s.change_core(index, |core| {
                        core.disabled = if flag { 0 } else { core.online };
                        core.on = flag;
                    });
                })?;
            }
            // Where all flags are set, the bit is off with and without a step.
            if !flag {
                notices("the step", config, &|s| {
                    s.change_core(index, |core| core.stepping ^= true);
                })?;
            }
        }
        Ok(())
    }

    fn change_core(&mut self, index: usize, change: impl FnOnce(&mut CoreState)) {
        let core = Core(AtomicU32::new(self.cores[index]));
        change(&mut core.lock());
        self.cores[index] = core.0.into_inner();
    }
}
