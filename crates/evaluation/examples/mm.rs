use burn::tensor::*;
use std::time::Instant;
fn main() {
    let dev = Device::flex();
    let d = 384;
    for (q, n) in [(256, 1024), (512, 1024), (512, 2048), (512, 4096), (1024, 1024), (1024, 2048),(2048,1024),(4096,512), (1024, 4096), (256, 50000), (2048, 4096), (4096,4096)] {
        let a = Tensor::<2>::random([q, d], Distribution::Default, &dev);
        let b = Tensor::<2>::random([n, d], Distribution::Default, &dev);
        let bt = b.clone().transpose();
        let bc = Tensor::<2>::from_data(bt.clone().into_data(), &dev);
        let reps = (60_000_000 / (q * n)).max(1);
        let mut best = [f64::INFINITY; 4];
        for _ in 0..3 {
        for (w, t) in [&bt, &bc].into_iter().enumerate() {
            let t0 = Instant::now();
            for _ in 0..reps { std::hint::black_box(a.clone().matmul(t.clone())); }
            best[w] = best[w].min(t0.elapsed().as_secs_f64());
        }
        let t0 = Instant::now();
        for _ in 0..reps { std::hint::black_box(a.clone().matmul(bt.clone()).try_into_data().unwrap()); }
        best[2] = best[2].min(t0.elapsed().as_secs_f64());
        let t0 = Instant::now();
        for _ in 0..reps { std::hint::black_box(b.clone().matmul(a.clone().transpose())); }
        best[3] = best[3].min(t0.elapsed().as_secs_f64());
        }
        let gf = |t: f64| 2.0 * (q * n * reps) as f64 * d as f64 / t / 1e9;
        println!("{q}x{n}: transposed {:.0} contiguous {:.0} with vec {:.0} swapped {:.0} GFLOP/s", gf(best[0]), gf(best[1]), gf(best[2]), gf(best[3]));
    }
}
