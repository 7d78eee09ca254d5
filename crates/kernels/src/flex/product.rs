//! The matrix product of two plain tensors, for operations that are written on tensors.

use burn::backend::flex::{FlexTensor, Layout};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Flex, backend_extension};
use burn::tensor::{Bytes, DType, Shape};

use super::gemm::{Matrix, multiply};
use super::memory::{halved, widened};
use super::{contiguous, dims2, elements, tensor};
use crate::Precision;

/// The product, on `flex` without automatic differentiation.
#[backend_extension(Flex)]
pub(crate) trait FlexProducts: Backend {
    /// `a [M, I]`, `b [I, N]` of single precision → `[M, N]`, with operands and result rounded as the precision says.
    fn product(a: FloatTensor<Self>, b: FloatTensor<Self>, precision: Precision) -> FloatTensor<Self>;
    /// `a [M, I]`, `b [I, N]` → `[M, N]`, all of bfloat16.
    fn product_of_bf16(a: FloatTensor<Self>, b: FloatTensor<Self>) -> FloatTensor<Self>;
}

impl FlexProducts for Flex {
    fn product(a: FlexTensor, b: FlexTensor, precision: Precision) -> FlexTensor {
        let ([rows, _], [_, columns]) = (dims2(&a), dims2(&b));
        let (a, b) = (Laid::out(a), Laid::out(b));
        tensor(multiply(a.matrix(), b.matrix(), precision), [rows, columns])
    }

    fn product_of_bf16(a: FlexTensor, b: FlexTensor) -> FlexTensor {
        let ([rows, _], [_, columns]) = (dims2(&a), dims2(&b));
        let (a, b) = (Laid::out(a).widened(), Laid::out(b).widened());
        let product = multiply(a.matrix(), b.matrix(), Precision::Bf16);
        FlexTensor::new(
            Bytes::from_elems(halved(&product)),
            Layout::contiguous(Shape::from([rows, columns])),
            DType::BF16,
        )
    }
}

/// A matrix whose elements lie in order, or those of its transpose: neither is copied.
struct Laid {
    tensor: FlexTensor,
    transposed: bool,
}

impl Laid {
    fn out(tensor: FlexTensor) -> Self {
        let turned = tensor.transpose(0, 1);
        match !tensor.is_contiguous() && turned.is_contiguous() {
            true => Self { tensor: turned, transposed: true },
            false => Self { tensor: contiguous(tensor), transposed: false },
        }
    }

    /// The same of single precision, from bfloat16.
    fn widened(self) -> Self {
        let wide = widened(self.tensor.as_slice().expect("contiguous bfloat16"));
        Self { tensor: tensor(wide, dims2(&self.tensor)), ..self }
    }

    fn matrix(&self) -> Matrix<'_> {
        let [rows, columns] = dims2(&self.tensor);
        let matrix = Matrix::new(elements(&self.tensor), rows, columns);
        if self.transposed { matrix.t() } else { matrix }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Tensor, TensorData};

    use crate::testing::numbers;
    use crate::times;

    #[test]
    fn equals_the_backend_s_own_whichever_operand_is_transposed() {
        let of = |rows: usize, columns: usize, seed| {
            let data = TensorData::new(numbers(rows * columns, seed), [rows, columns]);
            Tensor::<2>::from_data(data, &Device::flex())
        };
        let mut cases = 0;
        for (rows, inner, columns) in [(1, 1, 1), (5, 7, 3), (4, 1, 6), (130, 70, 90)] {
            for (turned_a, turned_b) in [(false, false), (true, false), (false, true), (true, true)] {
                let a = if turned_a { of(inner, rows, 1).transpose() } else { of(rows, inner, 1) };
                let b = if turned_b { of(columns, inner, 2).transpose() } else { of(inner, columns, 2) };
                let difference = times(a.clone(), b.clone()) - a.matmul(b);
                assert!(difference.abs().max().into_scalar::<f32>() < 1e-5, "{rows} {inner} {columns}");
                cases += 1;
            }
        }
        assert_eq!(cases, 16);
        // A part of a matrix is neither in order nor transposed.
        let part = of(6, 9, 3).narrow(1, 2, 4);
        let difference = times(part.clone(), of(4, 5, 4)) - part.matmul(of(4, 5, 4));
        assert!(difference.abs().max().into_scalar::<f32>() < 1e-6);
    }
}
